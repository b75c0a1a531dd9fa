"""Triton's interpreter, mended where it differs from a GPU, for the tests of kernels on CPU tensors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

# `pytestmark` of a file whose tests need it
MARKS = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    # NumPy under the interpreter warns where a GPU gives inf or nan, such as log2(0) of a row with no key
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
# a kernel's paths: no mask, only full tiles, bits, unused keys, unused queries, planes by batch, by head and by both
MASK_NAMES = ["none", "causal", "tiles", "empty_rows", "empty_columns", "per_batch", "per_head", "per_batch_head"]


@contextmanager
def plans_anew() -> Iterator[None]:
    """Plans of packing are made again, before and after, as launches have other constants."""
    from anymask.packing.triton import plans

    plans.forget()
    yield
    plans.forget()


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    import numpy as np
    from triton.runtime import interpreter

    builder, tl = interpreter.interpreter_builder, interpreter.tl
    create_dot, cast_impl = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        # the interpreter cuts the low half of an fp32 off; a GPU rounds to nearest even
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    def widened(handle: Any) -> Any:
        # the interpreter holds bf16 as uint16, which its own dot multiplies as integers
        return cast_impl(builder, handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        # what a GPU refuses and NumPy promotes in silence
        assert a.dtype.scalar == b.dtype.scalar, f"dot of {a.dtype} and {b.dtype}"
        return create_dot(self, widened(a), widened(b), *rest)

    patch_lang, patched = interpreter._patch_lang, set[Any]()

    def patch_lang_once(fn: Any) -> Any:
        # the interpreter patches all of triton.language at each call of a function, which takes longer than the call
        languages = {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}
        if languages <= patched:
            return interpreter._LangPatchScope()
        is_launch, scope = not patched, patch_lang(fn)
        patched.update(languages)
        if is_launch:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    debug = builder.options.debug
    with pytest.MonkeyPatch.context() as patch, plans_anew():
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
        patch.setattr(interpreter, "_patch_lang", patch_lang_once)
        # int32 arithmetic is checked for overflow
        object.__setattr__(builder.options, "debug", True)
        # the interpreter takes as long for few rows
        patch.setattr("anymask.packing.triton.plans.STRIP", 64)
        yield
        object.__setattr__(builder.options, "debug", debug)
