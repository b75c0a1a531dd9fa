"""`anymask bench`: times your mask at your shapes on this machine, beside SDPA and FlexAttention.

Every result is compared with fp64 attention first, where that fits, so that no time belongs to a wrong result.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import anymask
from anymask import BlockMask, backends
from anymask.testing import MASKS, make_qkv, reference

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# most pairs of query and key, over batch and heads, that are computed in fp64 or by the dense `reference` backend
DENSE_PAIRS = {"cuda": 2**28, "cpu": 2**24}
# seconds that a call is repeated for
SECONDS = 0.3
# right results measure about 1e-3 in 16 bits and 1e-6 in fp32
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float64: 1e-10}
SDPA = "SDPA with the mask"


@dataclass
class Row:
    """One way to attend. Numbers are None where they were not taken, and `note` says why."""

    name: str
    forward_ms: float | None = None
    # forward and backward together
    both_ms: float | None = None
    # largest of |x - fp64| / |fp64| over o, dq, dk, dv, Frobenius norms
    error: float | None = None
    # peak above what was held before a forward and backward call, MiB; GPUs only
    memory_mib: float | None = None
    note: str = ""


def measure(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, dense: Tensor | None, backward: bool = True
) -> Iterator[Row]:
    """A row for each backend that can run, for SDPA with and without the mask, and for FlexAttention on a GPU.

    Args:
        q: `[batch, q_heads, q_len, head_dim]`; k and v as in `attention`.
        mask: packed; None attends everywhere.
        dense: the same mask, bool, broadcastable to `[batch, q_heads, q_len, kv_len]`.
        backward: whether forward and backward together are timed, and gradients compared, too.
    """
    leaves = [t.detach().requires_grad_(backward) for t in (q, k, v)]
    do, device = torch.randn(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device), q.device.type
    is_small = math.prod(q.shape[:3]) * k.shape[2] <= DENSE_PAIRS[device]
    right = {}
    if is_small:
        for name, seen in (("masked", dense), ("unmasked", None)):
            o, _, *grads = reference(q, k, v, seen, None, do)
            right[name] = [o, *grads] if backward else [o]
    for row, attend, kind in _ways(q, k, v, mask, dense, is_small):
        if attend is not None:
            try:
                found = _run(attend, leaves, do, backward)
                if is_small:
                    # the largest, and NaN if one is
                    row.error = float(
                        torch.tensor([_error(*pair) for pair in zip(found, right[kind], strict=True)]).max()
                    )
                    if not row.error <= TOLERANCE[q.dtype]:
                        row.note = f"WRONG: error {row.error:.1e}, allowed are {TOLERANCE[q.dtype]:.0e}"
                        yield row
                        continue
                row.forward_ms = _milliseconds(partial(attend, *leaves), device)
                if backward:
                    row.both_ms = _milliseconds(partial(_run, attend, leaves, do, True), device)
                row.memory_mib = _memory(partial(_run, attend, leaves, do, backward)) if device == "cuda" else None
            except (RuntimeError, ValueError) as error:
                # out of memory, a kernel that torch does not have for this call, a failed compilation
                row.note = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        yield row


def _ways(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, dense: Tensor | None, is_small: bool
) -> Iterator[tuple[Row, Attend | None, str]]:
    chosen = anymask.explain(q, k, v, mask).backend
    for name, reason in backends.reasons(q, k, v, mask).items():
        if reason is None and name == "reference" and not is_small:
            reason = f"its memory is proportional to q_len * kv_len; timed up to {DENSE_PAIRS[q.device.type]:,} pairs"
        row = Row(f"anymask, {name}" + (" (chosen)" if name == chosen else ""), note=reason or "")
        attend = partial(anymask.attention, mask=mask, backend=name) if reason is None else None
        yield row, attend, "masked"
    grouped: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
    if dense is not None:
        yield Row(SDPA), partial(scaled_dot_product_attention, attn_mask=dense, **grouped), "masked"
    yield Row("SDPA, mask left out"), partial(scaled_dot_product_attention, **grouped), "unmasked"
    if q.device.type != "cuda":
        yield Row("FlexAttention, compiled", note="it has a backward pass on GPUs only"), None, "masked"
        return
    yield Row("FlexAttention, compiled"), _flex(q, k, dense), "masked"


def _flex(q: Tensor, k: Tensor, dense: Tensor | None) -> Attend:
    """FlexAttention with a function that reads the tensor; its block mask is made in the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    @cache
    def attend() -> Attend:
        block_mask = None
        if dense is not None:
            planes = dense[(None,) * (4 - dense.dim())]
            # a dimension of 1 is shared
            batch, heads = (None if n == 1 else n for n in planes.shape[:2])

            def looks_up(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                at = zip((b, h, i, j), planes.shape, strict=True)
                return planes[tuple(index * 0 if n == 1 else index for index, n in at)]

            block_mask = create_block_mask(looks_up, batch, heads, q.shape[2], k.shape[2], device=str(q.device))
        compiled: Any = torch.compile(flex_attention, dynamic=False)
        return partial(compiled, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])

    return lambda q, k, v: attend()(q, k, v)


def _run(attend: Attend, leaves: list[Tensor], do: Tensor, backward: bool) -> list[Tensor]:
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)] if backward else [out]


def _error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / (right.norm() or 1.0))


def _milliseconds(call: Callable[[], object], device: str) -> float:
    """Median; on a GPU by events with a flushed cache where Triton is there, else by torch's timer."""
    if device == "cuda" and importlib.util.find_spec("triton"):
        from triton.testing import do_bench

        return float(do_bench(call, rep=int(SECONDS * 1e3), return_mode="median"))
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=SECONDS).median * 1e3)


def _memory(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def load_mask(
    name: str, batch: int, heads: int, q_len: int, kv_len: int, device: torch.device | str
) -> tuple[BlockMask | None, Tensor | None]:
    """The mask of a name in `anymask.testing.MASKS`, or of a file: packed, and dense.

    Raises:
        ValueError: there is no such name or file, or the file holds something else or another size.
    """
    if name == "none":
        return None, None
    if name in MASKS:
        mask, dense = MASKS[name](batch, heads, q_len, kv_len, 0, device)
        return anymask.pack(dense if mask is None else mask, q_len=q_len, kv_len=kv_len, device=device), dense
    if not Path(name).is_file():
        raise ValueError(f"--mask is {name!r}; allowed are a file and {', '.join(MASKS)}")
    if name.endswith(".safetensors"):
        packed = BlockMask.load(name, device)
    else:
        try:
            tensor = torch.load(name, map_location=device, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{name} is not what torch.save wrote: {str(error).splitlines()[0][:80]}") from error
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool or tensor.dim() < 2:
            found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} holds a {found}; allowed is a bool tensor [..., q_len, kv_len]")
        packed = anymask.pack(tensor)
    if (packed.q_len, packed.kv_len) != (q_len, kv_len):
        sizes = f"--len {packed.q_len} --kv-len {packed.kv_len}"
        raise ValueError(f"{name} is a mask of {packed.q_len} x {packed.kv_len}; it needs {sizes}")
    if packed.batch not in (1, batch) or packed.heads not in (1, heads):
        raise ValueError(f"{name} has {packed.batch} samples and {packed.heads} heads; allowed are 1 and those given")
    return packed, packed.to_dense()


def table(rows: list[Row], backward: bool) -> str:
    """Rows as text; times also in parts of that of SDPA with the mask, or without where there is none."""
    base = next((r for r in rows if r.name == SDPA and r.forward_ms), rows[-2])
    kinds = ("forward_ms", "both_ms") if backward else ("forward_ms",)
    head = ["", *(h for kind in kinds for h in (kind.replace("_", ", "), "ratio")), "error", "MiB", ""]
    lines = [head]
    for row in rows:
        cells = [row.name]
        for kind in kinds:
            mine, other = getattr(row, kind), getattr(base, kind)
            cells += [f"{mine:.4g}" if mine else "-", f"{mine / other:.2f}" if mine and other else "-"]
        numbers = (row.error, ".1e"), (row.memory_mib, ",.1f")
        lines.append([*cells, *("-" if n is None else format(n, f) for n, f in numbers), row.note])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    text = [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=False)), line[-1]]
        )
        for line in lines
    ]
    return "\n".join([*(t.rstrip() for t in text), f"ratio: to {base.name}; error: to fp64, relative"])


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name}; allowed are auto, cpu, cuda and cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {name}, but torch finds no GPU")
    return torch.device(name)


def command(
    mask: Annotated[str, typer.Option(help="A name (see its error), or a .pt or .safetensors file.")] = "random",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    q_heads: Annotated[int, typer.Option(min=1)] = 8,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="As many as query heads unless given.")] = None,
    length: Annotated[int, typer.Option("--len", min=1, help="Queries.")] = 1024,
    kv_len: Annotated[int | None, typer.Option(min=1, help="Keys; as many as queries unless given.")] = None,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    v_dim: Annotated[int | None, typer.Option(min=1, help="As head_dim unless given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on a GPU, else float32, unless given.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backward: Annotated[bool, typer.Option(help="Time forward and backward together too.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number there.")] = None,
) -> None:  # fmt: skip
    """Time a mask at your shapes on this machine: each backend, SDPA, FlexAttention."""
    try:
        where = _device(device)
        kind = dtype or ("bfloat16" if where.type == "cuda" else "float32")
        allowed = [str(t).removeprefix("torch.") for t in TOLERANCE]
        if kind not in allowed:
            raise ValueError(f"--dtype is {kind}; allowed are {', '.join(allowed)}")
        sizes = batch, q_heads, kv_heads or q_heads, length, kv_len or length, head_dim
        q, k, v = make_qkv(*sizes, v_dim, dtype=getattr(torch, kind), device=where)
        packed, dense = load_mask(mask, batch, q_heads, length, kv_len or length, where)
        stats = anymask.explain(q, k, v, packed).mask
    except (ValueError, TypeError) as error:
        typer.secho(f"anymask: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    density = 1.0 if stats is None else stats.density
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    shape = f"{kind} B{batch} H{q_heads}:{sizes[2]} L{length}x{sizes[4]} D{head_dim}/{v.shape[3]}"
    typer.echo(f"{name}, torch {torch.__version__}: {mask} mask, {density:.1%} of pairs, {shape}")
    rows = []
    for row in measure(q, k, v, packed, dense, backward):
        rows.append(row)
        typer.echo(f"{row.name}: {row.note or 'done'}", err=True)
    typer.echo(table(rows, backward))
    if json_file is not None:
        numbers = {"device": name, "torch": torch.__version__, "mask": mask, "shape": shape, "density": density}
        json_file.write_text(json.dumps({**numbers, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        typer.echo(f"Numbers: {json_file.resolve()}")
