"""The backends in order of preference, and how one is chosen.

A backend is a module with three functions: `why_not(q, k, v, block_mask, scores)` is None or the reason it cannot run
the call; `forward(q, k, v, block_mask, sm_scale) -> (o, lse)`; `backward(q, k, v, o, lse, do, dlse, block_mask,
sm_scale, deterministic) -> (dq, dk, dv)`, bit-equal from run to run if `deterministic`. Inputs are validated,
non-empty, and have a unit last stride; `block_mask` None means every pair. o lies in memory as q does, and gradients as
what they are of (`anymask.layout`).

`hopper` and `triton` take operands of a plan too, which have all of a tensor but its address and values. They launch
by `anymask.plan`, what they call of torch is written down, and `anymask.calls` runs it. Where they read what no plan
knows, such as how many tiles a mask has, a call with scores has no plan and is launched anew each time.

A backend that takes `scores` has them as the last argument of `forward`, and `backward_scores(*arguments of backward,
scores, needs) -> ScoreGrads`, bit-equal from run to run. lse has the sinks in it, and is of the weights before dropout.
o and lse of one backend may have their gradients from another: `hopper` leaves to `triton` what its backward kernels do
not have.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from anymask.backends.gpu import split
from anymask.block_mask import BlockMask
from anymask.scores import Scores

# the first that can run a call does: on a GPU hopper is faster than triton, on a CPU cpu than Triton's interpreter;
# reference runs anything, in memory proportional to q_len * kv_len
Backend: TypeAlias = Literal["hopper", "cpu", "triton", "reference"]
NAMES: tuple[Backend, ...] = get_args(Backend)


@cache
def load(name: str) -> ModuleType:
    """The backend's module, imported on first use: `hopper` and `triton` need Triton installed."""
    return import_module(f"{__name__}.{name}")


def reasons(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None, scores: Scores | None = None
) -> dict[str, str | None]:
    """For each backend in order: None if it can run the call, else why it cannot."""
    return {name: load(name).why_not(q, k, v, block_mask, scores) for name in NAMES}


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None,
    backend: str | None = None,
    scores: Scores | None = None,
) -> ModuleType:
    """The backend to run: the named one, or the first that can.

    Raises:
        ValueError: the named backend is unknown, or cannot run the call (with its reason). It never falls back.
    """
    if backend is None:
        return next(b for b in map(load, NAMES) if b.why_not(q, k, v, block_mask, scores) is None)
    check_name(backend)
    reason = load(backend).why_not(q, k, v, block_mask, scores)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run this call: {reason}")
    return load(backend)


def for_gradients(chosen: ModuleType, scores: Scores) -> ModuleType:
    """The backend whose `backward_scores` follows the forward pass of `chosen`."""
    has_less = chosen is load("hopper") and chosen.why_not_gradients(scores) is not None
    return load("triton") if has_less else chosen


def pair_sums(chosen: ModuleType, backend: str | None) -> dict[str, Any]:
    """What `backward_scores` of `chosen` takes beside the rest: of `triton`, unless it was asked for by name, the sums
    over pairs of a Hopper GPU.
    """
    is_automatic = chosen is load("triton") and backend != "triton"
    return {"pair_sums": load("hopper").sums_over_pairs} if is_automatic else {}


def splits(name: str, q: Tensor, k: Tensor, block_mask: BlockMask | None) -> int:
    """Programs that share the keys of a row in the forward pass of the backend `name`; 1 if none do."""
    return split.count(q, k, block_mask) if name in ("hopper", "triton") else 1


def check_name(backend: str | None) -> None:
    """Raise ValueError unless None or the name of a backend."""
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend is {backend!r}; allowed are None and {', '.join(map(repr, NAMES))}")
