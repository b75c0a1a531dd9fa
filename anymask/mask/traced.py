"""What builders read on the host, as operators: a function that torch traces cannot look at values.

Sizes that depend on values are symbols there, of which nothing may be asked: `pack` checks them when the function runs.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

from anymask.mask.arguments import abbreviate, check_integers, check_one_device, values

_LIBRARY = torch.library.Library("anymask", "FRAGMENT")
_LIBRARY.define("documents(Tensor cu_seqlens, Tensor? kv_cu_seqlens) -> Tensor[]")
_LIBRARY.define("preorder(Tensor parents) -> Tensor[]")


def documents(cu_seqlens: Tensor, kv_cu_seqlens: Tensor | None) -> list[Tensor]:
    """int64 `[length]`, the document of each query; beside `kv_cu_seqlens` also that of each key.

    Raises:
        ValueError: bounds that do not begin at 0, decrease, or are of other documents.
    """
    check_one_device(cu_seqlens=cu_seqlens, kv_cu_seqlens=kv_cu_seqlens)
    given = {"cu_seqlens": cu_seqlens, "kv_cu_seqlens": kv_cu_seqlens}
    found = {name: check_integers(name, t, (1,)) for name, t in given.items() if t is not None}
    if torch.compiler.is_compiling():
        numbers: list[Tensor] = torch.ops.anymask.documents(cu_seqlens, kv_cu_seqlens)
        return numbers
    for name, t in found.items():
        bounds = values(name, t)
        if not bounds or bounds[0] != 0 or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"{name} is {abbreviate(bounds)}; allowed are numbers that start at 0 and do not decrease")
    n, kv_n = (len(list(found.values())[side]) - 1 for side in (0, -1))
    if n != kv_n:
        raise ValueError(f"kv_cu_seqlens has {kv_n} documents but cu_seqlens has {n}; allowed are as many")
    return [numbers_of(t.to(torch.int64)) for t in found.values()]


def numbers_of(bounds: Tensor) -> Tensor:
    """int64 `[length]`: the document, or block, of each token."""
    numbers = torch.arange(len(bounds) - 1, device=bounds.device)
    return numbers.repeat_interleave(bounds.diff())


def preorder(parents: Tensor) -> list[Tensor]:
    """Each token's place in a walk that visits children after their parent, and the place after its last descendant.

    Args:
        parents: int64 `[batch, heads, length]`.

    Returns:
        Two such tensors.

    Raises:
        ValueError: a parent out of range, or parents that form a cycle.
    """
    if torch.compiler.is_compiling():
        places: list[Tensor] = torch.ops.anymask.preorder(parents)
        return places
    rows = values("parents", parents.flatten(0, 1))
    numbered = torch.tensor([_walk(row) for row in rows], dtype=torch.int64, device=parents.device)
    return [t.reshape(parents.shape) for t in numbered.view(len(rows), 2, parents.shape[2]).unbind(1)]


def _walk(parents: list[int]) -> tuple[list[int], list[int]]:
    children: list[list[int]] = [[] for _ in parents]
    roots: list[int] = []
    for token, parent in enumerate(parents):
        if not -1 <= parent < len(parents):
            raise ValueError(f"parents[{token}] is {parent}; allowed are -1 to {len(parents) - 1}")
        (roots if parent < 0 else children[parent]).append(token)
    walk: list[int] = []
    first, end = [-1] * len(parents), [0] * len(parents)
    stack = roots[::-1]
    while stack:
        token = stack.pop()
        first[token] = len(walk)
        walk.append(token)
        stack += children[token][::-1]
    if len(walk) < len(parents):
        raise ValueError(f"parents form a cycle through token {first.index(-1)}; allowed are trees")
    for token in reversed(walk):
        end[token] = max([first[token] + 1, *(end[child] for child in children[token])])
    return first, end


def unknown_size() -> torch.SymInt:
    """A size that depends on values, in a fake.

    `new_dynamic_size` of torch's context refuses it outside of `fullgraph=True`, and the graph would break.
    """
    shape_env = torch.library.get_ctx()._shape_env
    if shape_env is None:
        raise NotImplementedError("a mask inside fake tensors without symbolic sizes; allowed is its BlockMask")
    size: torch.SymInt = allocate_size(shape_env)
    return size


@torch.library.register_fake("anymask::documents")
def _documents_fake(cu_seqlens: Tensor, kv_cu_seqlens: Tensor | None) -> list[Tensor]:
    return [t.new_empty(unknown_size(), dtype=torch.int64) for t in (cu_seqlens, kv_cu_seqlens) if t is not None]


@torch.library.register_fake("anymask::preorder")
def _preorder_fake(parents: Tensor) -> list[Tensor]:
    return [parents.new_empty(parents.shape) for _ in range(2)]


def _preorder_kernel(parents: Tensor) -> list[Tensor]:
    # what an operator returns may not share memory
    return [t.clone() for t in preorder(parents)]


_LIBRARY.impl("documents", documents, "CompositeExplicitAutograd")
_LIBRARY.impl("preorder", _preorder_kernel, "CompositeExplicitAutograd")
