"""The `anymask` command: parses, calls `demo`, `gallery` and `viz`, prints."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import anymask
from anymask import bench, gallery, machine, viz
from anymask import demo as work
from anymask.mask.block_mask import read_safetensors

# the table of masks needs this many columns; a narrower terminal, or a file, wraps lines instead of cutting cells
TABLE_WIDTH = 102
# longest plane whose tokens `show` draws one by one
SHOW_TOKENS = 64

app = typer.Typer(
    help="FlashAttention, forward and backward, under any mask.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"anymask {anymask.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions.")] = False,
) -> None: ...


@app.command()
def demo(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of text, weights and masks.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds: small sizes, timings mean nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("anymask-demo.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number there.")] = None,
) -> None:
    """Train on packed documents, show that nothing leaks, measure masks; exit 1 if a check fails."""
    try:
        viz.require_matplotlib()
    except ImportError as error:
        _fail(str(error))
    where = _device(device)
    sizes = work.Sizes.choose(where, quick, steps)
    console = Console()
    # not Console(width=...) from the start: a wide terminal keeps its width
    console.width = max(console.width, TABLE_WIDTH)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"anymask {anymask.__version__} on {where} ({name}), torch {torch.__version__}")

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    texts = work.documents(longest=600 if sizes.row_len > 600 else 200)
    characters = sum(map(len, texts))
    console.print(f"Text: {len(texts)} help topics of Python, {characters:,} bytes, {sizes.row_len} to a row\n")

    def batch() -> work.Batch:
        return work.pack_rows(texts, sizes.rows, sizes.row_len, generator).to(where)

    model = work.Model().to(where)
    losses, rows = [], []
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        training = progress.add_task("training", total=sizes.steps)
        for step, loss in enumerate(work.train(model, (batch() for _ in range(sizes.steps))), start=1):
            losses.append(loss)
            progress.update(training, advance=1, description=f"training: {loss:.3f} nats/token")
            if step == 1 or step % max(1, sizes.steps // 4) == 0:
                progress.console.print(f"step {step:4}: {loss:.3f} nats per token")
        last = batch()
        packed = anymask.pack(last.mask(), q_len=sizes.row_len, kv_len=sizes.row_len, device=where)
        comparison = work.compare(model, last, packed)
        masks = list(work.table_masks(last, sizes.heads, seed))
        measuring = progress.add_task("measuring", total=len(masks))
        for mask in masks:
            progress.update(measuring, description=f"measuring: {mask[0]}")
            rows.append(work.measure(*mask, sizes, seed))
            progress.advance(measuring)

    proven = comparison.equal and comparison.leaks
    console.print(_comparison_table(comparison))
    console.print(f"{packed!r}\n", highlight=False)
    console.print(_mask_table(rows, sizes, where))
    viz.plot(packed, out, title=f"{comparison.documents} documents in {sizes.rows} rows: the first row")
    console.print(f"Picture of the document mask and its tiles: {out.resolve()}", soft_wrap=True)
    if json_file is not None:
        numbers = {
            "anymask": anymask.__version__,
            "torch": torch.__version__,
            "device": f"{where} ({name})",
            "seed": seed,
            "sizes": asdict(sizes) | {"dtype": str(sizes.dtype)},
            "losses": losses,
            "comparison": asdict(comparison) | {"ok": proven, "tolerance": work.TOLERANCE},
            "table": [asdict(row) for row in rows],
        }
        json_file.write_text(json.dumps(numbers, indent=2) + "\n")
        console.print(f"Numbers: {json_file.resolve()}", soft_wrap=True)
    wrong = [row.mask for row in rows if not row.ok]
    if wrong or not proven:
        found = [*wrong, *([] if proven else ["the comparison of packed and separate documents"])]
        _fail(f"check failed: {', '.join(found)}")


def _comparison_table(found: work.Comparison) -> Table:
    table = Table(
        title=f"\nLoss and gradients of one batch: {found.documents} documents, {found.tokens:,} targets, fp32",
        caption=f"difference: the largest over all parameters of max |difference| / max |gradient|,\n"
        f"allowed {work.TOLERANCE:.0e}; the mask is packed once for all layers and the backward pass",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("", "nats per token", "gradient difference", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    verdict = "[green]equal[/]" if found.equal else "[red]differs: check failed[/]"
    leak = "leaks" if found.leaks else "[red]no leak seen: check failed[/]"
    table.add_row("each document alone (torch)", f"{found.loss_alone:.6f}", "", "the truth")
    table.add_row("packed, document mask (anymask)", f"{found.loss_packed:.6f}", f"{found.grad_packed:.1e}", verdict)
    table.add_row("packed, plain causal (torch)", f"{found.loss_leaky:.6f}", f"{found.grad_leaky:.1e}", leak)
    return table


def _mask_table(rows: list[work.Row], sizes: work.Sizes, device: torch.device) -> Table:
    dtype = str(sizes.dtype).removeprefix("torch.")
    table = Table(
        title=f"{sizes.heads} heads, {sizes.row_len} tokens, head_dim {sizes.head_dim}, {dtype}, {device.type}",
        caption=f"error: max |x - fp64| / max |fp64|, allowed {work.TABLE_TOLERANCE[sizes.dtype]:.0e}\n"
        "time, forward and with backward: anymask / torch scaled_dot_product_attention\n"
        f"with the same bool mask, median of {sizes.repeats}, below 1 is faster; packing is measured apart (--json)",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("mask", no_wrap=True)
    headings = "density", "tiles\n·/░/█", "error\no", "\ndq", "\ndk", "\ndv", "mask KiB\ndense", "\npacked"
    for heading in (*headings, "time\nfwd", "\nboth"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        errors = [f"{error:.0e}" for error in row.errors.values()]
        sizes_kib = [f"{n / 1024:,.0f}" for n in (row.dense_bytes, row.packed_bytes)]
        times = f"{row.forward_ratio:.2f}", f"{row.both_ratio:.2f}"
        tiles = "/".join(map(str, row.tiles))
        table.add_row(row.mask, f"{row.density:.1%}", tiles, *errors, *sizes_kib, *times, style="" if row.ok else "red")
    return table


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="For a machine to read.")] = False) -> None:
    """Versions, GPUs, and the backends that can run here, with the reasons of those that cannot."""
    found = machine.report()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for name, version in found["versions"].items():
        print(f"{name:9} {version}")
    for i, gpu in enumerate(found["gpus"]):
        print(f"GPU {i}     {gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB")
    for name, reason in found["backends"].items():
        print(f"{name:9} {'can run' if reason == 'yes' else 'not here: ' + reason}")


app.command("bench")(bench.command)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def show(
    context: typer.Context,
    mask: Annotated[
        str,
        typer.Argument(
            help="A mask of the gallery; a .pt, .npy or .safetensors file of a bool tensor; a saved BlockMask."
        ),
    ],
    length: Annotated[int | None, typer.Option("--len", min=1, help="Queries; 1024 unless a file says.")] = None,
    kv_len: Annotated[int | None, typer.Option(min=1, help="Keys; as many as queries.")] = None,
    plane: Annotated[tuple[int, int], typer.Option(help="Batch and head to draw.")] = (0, 0),
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write a picture there too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what it costs, for a machine to read.")] = False,
) -> None:
    """Draw the tiles of a mask, and its tokens if they are few.

    Numbers of a mask by name are options: sliding_window --window 64, neighbourhood_2d --shape 16,64 --kernel 5.
    """
    try:
        lazy = _mask(mask, _numbers(context.args))
        if isinstance(lazy, anymask.Mask):
            length = length or gallery.LENGTH
            kv_len = kv_len or length
        packed = lazy if isinstance(lazy, anymask.BlockMask) else anymask.pack(lazy, q_len=length, kv_len=kv_len)
        if out is not None:
            viz.plot(packed, out, plane, title=mask)
        if as_json:
            sizes = {name: getattr(packed, name) for name in ("q_len", "kv_len", "batch", "heads")}
            print(json.dumps({"mask": mask, **sizes, **asdict(packed.stats())}, indent=2))
            return
        print(repr(packed))
        if max(packed.q_len, packed.kv_len) <= SHOW_TOKENS:
            shares, _ = viz.token_shares(packed, plane)
            print("\n".join(" ".join("█" if share else "·" for share in row) for row in shares.tolist()))
        scale = viz.scale(packed)
        print(f"tiles of 128 x 128, {scale} x {scale} to a character: {viz.LEGEND}\n{viz.to_text(packed, plane)}")
        if out is not None:
            print(out.resolve())
    except (ValueError, ImportError) as error:
        _fail(str(error))


def _numbers(arguments: list[str]) -> dict[str, Any]:
    """`--name 3`, `--name 0.5` and `--name 3,4`, as arguments of a builder."""
    found: dict[str, Any] = {}
    for option, value in zip(arguments[::2], [*arguments[1::2], ""], strict=False):
        if not option.startswith("--") or not re.fullmatch(r"-?\d+(\.\d+|(,-?\d+)*)", value):
            raise ValueError(
                f"{option} {value}".strip() + " is no option; allowed are --NAME 3, --NAME 0.5, --NAME 3,4"
            )
        parts = tuple(float(part) if "." in part else int(part) for part in value.split(","))
        found[option[2:].replace("-", "_")] = parts if len(parts) > 1 else parts[0]
    return found


def _by_name(name: str, numbers: dict[str, Any]) -> anymask.Mask:
    """A builder called with numbers."""
    builder = getattr(anymask, name)
    # the name that people use
    if name == "sliding_window" and "window" in numbers:
        numbers = {("left" if key == "window" else key): value for key, value in numbers.items()}
    parameters = inspect.signature(builder).parameters
    # the others are tensors and functions
    allowed = [key for key, p in parameters.items() if re.search("int|float", str(p.annotation))]
    unknown = [key for key in numbers if key not in allowed]
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in numbers]
    if unknown or missing:
        what = f"has no number {', '.join(unknown)}" if unknown else f"also needs {', '.join(missing)}"
        raise ValueError(f"{name} {what}; allowed are {', '.join(allowed) or 'none'}")
    made: anymask.Mask = builder(**numbers)
    return made


def _mask(name: str, numbers: dict[str, int | tuple[int, ...]]) -> anymask.Mask | anymask.BlockMask | torch.Tensor:
    if numbers and name in gallery.EXAMPLES:
        return _by_name(name, numbers)
    if numbers:
        raise ValueError(f"--{next(iter(numbers))} is for a mask by name, not for {name}")
    if name in gallery.EXAMPLES:
        return gallery.example(name)
    if not Path(name).is_file():
        raise ValueError(f"{name} is no file and no mask; allowed are {', '.join(gallery.EXAMPLES)}, FILE")
    if name.endswith(".safetensors"):
        _, tensors = read_safetensors(name)
        return next(iter(tensors.values())) if len(tensors) == 1 else anymask.BlockMask.load(name)
    if name.endswith(".npy"):
        return _from_numpy(name)
    loaded = torch.load(name, map_location="cpu", weights_only=True)
    if not isinstance(loaded, torch.Tensor):
        raise ValueError(f"{name} holds a {type(loaded).__name__}; allowed is one bool tensor")
    return loaded


def _from_numpy(name: str) -> torch.Tensor:
    try:
        import numpy as np
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs numpy: pip install numpy") from error
    array = np.load(name, allow_pickle=False)
    if array.dtype != np.bool_:
        raise ValueError(f"{name} has dtype {array.dtype}; allowed is bool (True = attend)")
    return torch.from_numpy(array)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        _fail(f"--device is {name}; allowed are auto, cpu, cuda and cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        _fail(f"--device is {name}, but torch finds no GPU")
    return torch.device(name)


def _fail(message: str) -> None:
    # not through rich, which would read the brackets of 'anymask[viz]' as markup
    typer.secho(f"anymask: {message}", fg="red", err=True)
    raise typer.Exit(1)
