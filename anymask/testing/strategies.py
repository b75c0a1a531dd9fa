"""Hypothesis strategies: masks as expressions of every builder, sizes, layouts, whole cases.

    @given(cases())
    def test_mine(case: Case) -> None:
        check(case)

A failing example shrinks to few names, short lengths and a small seed, and prints as a line of Python.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anymask.testing.cases import Case
from anymask.testing.expressions import KINDS, is_square
from anymask.testing.oracle import LAYOUTS

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    raise ImportError("anymask.testing.strategies needs hypothesis: pip install hypothesis") from error

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEADS = ((1, 1), (2, 2), (2, 1), (4, 2), (3, 1), (6, 2), (7, 1))
# around the tiles of 128 and the steps of kernels
EDGES = (1, 2, 16, 63, 64, 65, 127, 128, 129, 255, 256, 257)


def lengths(longest: int = 300) -> st.SearchStrategy[int]:
    """Numbers of queries or keys, often at the edge of a tile."""
    return st.one_of(st.integers(1, longest), st.sampled_from([n for n in EDGES if n <= longest]))


def expressions(names: Sequence[str] | None = None, max_parts: int = 4) -> st.SearchStrategy[str]:
    """Masks by expression, for `Case` and `make_mask`: names, by default of all, combined by `&`, `|` and `~`."""
    return st.recursive(
        st.sampled_from(sorted(names or KINDS)),
        lambda inner: st.one_of(
            inner.map("~{}".format),
            st.tuples(inner, inner).map(lambda pair: f"({pair[0]} & {pair[1]})"),
            st.tuples(inner, inner).map(lambda pair: f"({pair[0]} | {pair[1]})"),
        ),
        max_leaves=max_parts,
    )


@st.composite
def cases(
    draw: st.DrawFn,
    masks: st.SearchStrategy[str] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    longest: int = 300,
    dims: st.SearchStrategy[int] | None = None,
    layouts: Sequence[str] = LAYOUTS,
    scales: Sequence[float | None] = (None, 0.3, -0.7, 0.0, 2.0),
) -> Case:
    """Whole calls: every mask, lengths up to `longest`, head_dim and v_dim, GQA, strides, scales.

    Args:
        draw: given by hypothesis.
        masks: of expressions; default `expressions()`.
        dtypes, layouts, scales: to choose from.
        longest: queries or keys.
        dims: of head_dim and of v_dim; default 1 to 80.
    """
    mask = draw(expressions() if masks is None else masks)
    dims = st.integers(1, 80) if dims is None else dims
    q_len, kv_len = draw(lengths(longest)), draw(lengths(longest))
    q_heads, kv_heads = draw(st.sampled_from(HEADS))
    return Case(
        mask,
        q_len,
        q_len if is_square(mask) else kv_len,
        draw(dims),
        draw(st.sampled_from(list(dtypes))),
        draw(dims),
        draw(st.integers(1, 3)),
        q_heads,
        kv_heads,
        draw(st.sampled_from(list(layouts))),
        draw(st.sampled_from(list(scales))),
        draw(st.integers(0, 2**16)),
    )
