"""The `anymask` command: parses, calls `demo`, `gallery` and `viz`, prints."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
import typer.core
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import anymask
from anymask import bench, gallery, mask_argument, viz
from anymask import demo as work
from anymask.block_mask.files import check_target
from anymask.check import command as check_command
from anymask.collect_env import collect_env
from anymask.mask_argument import MOST_TOKENS

# the table of masks needs this many columns; a narrower terminal, or a file, wraps lines instead of cutting cells
TABLE_WIDTH = 102
# longest plane whose tokens `show` draws one by one
SHOW_TOKENS = 64

# of click, or of typer's own copy of it: the command line was wrong
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class OneLineErrors(typer.core.TyperGroup):
    """Commands that end with 0, with 1 if they fail, with 2 if they were called wrongly; and say why in one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line, and exit unless standalone_mode is False."""
        standalone = kwargs.pop("standalone_mode", True)
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except UsageError as error:
            code = _show_usage_error(error)
        except typer.Abort:
            code = _show_error("interrupted")
        except OSError as error:
            code = _show_error(str(error))
        if standalone:
            sys.exit(code)
        return code


def _show_usage_error(error: Any) -> int:
    """Print an error of the parser."""
    message = error.format_message()
    # without arguments it is the help, or empty as that was printed
    if not message or "\n" in message:
        typer.echo(message, err=True)
        return 2
    command = f"anymask {error.ctx.info_name}" if error.ctx is not None and error.ctx.parent else "anymask"
    return _show_error(f"{message} ({command} --help)", 2)


def _show_error(message: str, code: int = 1) -> int:
    # not through rich, which would read brackets of a message as markup
    typer.secho(f"anymask: {' '.join(message.split())}", fg="red", err=True)
    return code


app = typer.Typer(
    cls=OneLineErrors,
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
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of text, weights and masks.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds: small sizes, timings mean nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("anymask-demo.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number there.")] = None,
) -> None:
    """Train on packed documents, show that nothing leaks, measure masks; exit 1 if a check fails."""
    try:
        viz.require_matplotlib()
    except ImportError as error:
        _fail(str(error))
    try:
        for target in (out, json_file):
            if target is not None:
                viz.picture_target(target) if target is out else check_target(target)
    except ValueError as error:
        _fail(str(error), 2)
    where = _device(device)
    sizes = work.Sizes.choose(where, quick, steps)
    console = Console()
    # not Console(width=...) from the start: a wide terminal keeps its width
    console.width = max(console.width, TABLE_WIDTH)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"anymask {anymask.__version__} on {where} ({name}), torch {torch.__version__}")
    losses, comparison, packed, rows = _run_demo(console, where, sizes, seed)

    proven = comparison.equal and comparison.leaks
    console.print(_comparison_table(comparison))
    console.print(f"{packed!r}\n", highlight=False)
    console.print(_mask_table(rows, sizes, where))
    if any(row.busy for row in rows):
        most = max(row.others for row in rows)
        console.print(f"Other programs used up to {most:.1f} cores; times of those rows would mean nothing.\n")
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


def _run_demo(
    console: Console, where: torch.device, sizes: work.Sizes, seed: int
) -> tuple[list[float], work.Comparison, anymask.BlockMask, list[work.Row]]:
    """Losses, the comparison of the last batch, its mask, and the rows of the table, with progress."""
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
    return losses, comparison, packed, rows


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
        ratios = row.forward_ratio, row.both_ratio
        times = ["busy" if row.busy else f"{ratio:.2f}" for ratio in ratios]
        tiles = "/".join(map(str, row.tiles))
        table.add_row(row.mask, f"{row.density:.1%}", tiles, *errors, *sizes_kib, *times, style="" if row.ok else "red")
    return table


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="For a machine to read.")] = False) -> None:
    """Versions, GPUs, and the backends that can run here, with the reasons of those that cannot."""
    found = collect_env()
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


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def check(context: typer.Context) -> None:
    """Is attention on this machine correct? --quick, about a minute, or --full; --help has the options."""
    raise typer.Exit(check_command.main(context.args))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def show(
    context: typer.Context,
    mask: Annotated[
        str,
        typer.Argument(help="A mask of the gallery; a .pt, .npy or .safetensors file of a bool tensor or a BlockMask."),
    ],
    length: Annotated[
        int | None, typer.Option("--len", min=1, max=MOST_TOKENS, help="Queries; 1024 unless the mask says.")
    ] = None,
    kv_len: Annotated[int | None, typer.Option(min=1, max=MOST_TOKENS, help="Keys; as many as queries.")] = None,
    plane: Annotated[tuple[int, int], typer.Option(help="Batch and head to draw.")] = (0, 0),
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write a picture there too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what it costs, for a machine to read.")] = False,
) -> None:
    """Draw the tiles of a mask, and its tokens if they are few.

    Numbers of a mask by name are options: sliding_window --window 64, neighbourhood_2d --shape 16,64 --kernel 5,
    document --lens 300,250,474, tree --parents -1,0,0,1.
    """
    try:
        if out is not None:
            viz.picture_target(out)
        packed = _packed(mask_argument.find(mask, context.args, length, kv_len), length, kv_len)
        # before anything is written
        text = viz.to_text(packed, plane)
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
        print(f"tiles of 128 x 128, {scale} x {scale} to a character: {viz.LEGEND}\n{text}")
        if out is not None:
            print(out.resolve())
    except (mask_argument.UnreadableFile, ImportError, OSError, MemoryError) as error:
        _fail(str(error))
    except (ValueError, TypeError) as error:
        _fail(str(error), 2)


def _packed(found: mask_argument.Found, length: int | None, kv_len: int | None) -> anymask.BlockMask:
    """The mask at the lengths that were asked for, or that it says, or of the gallery."""
    if isinstance(found.mask, anymask.BlockMask):
        for name, asked, is_ in (("--len", length, found.mask.q_len), ("--kv-len", kv_len, found.mask.kv_len)):
            if asked not in (None, is_):
                raise ValueError(f"{name} is {asked} but the mask was packed for {is_}; allowed is {is_}, or none")
        return found.mask
    length, kv_len = length or found.q_len, kv_len or found.kv_len
    if isinstance(found.mask, anymask.Mask):
        length = length or gallery.LENGTH
        kv_len = kv_len or length
    for name, n in (("q_len", length or 0), ("kv_len", kv_len or 0)):
        if n > MOST_TOKENS:
            raise ValueError(f"{name} is {n:,} tokens; allowed are {MOST_TOKENS:,}")
    return anymask.pack(found.mask, q_len=length, kv_len=kv_len)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name, re.ASCII):
        _fail(f"--device is {name}; allowed are auto, cpu, cuda and cuda:N", 2)
    if name.startswith("cuda") and not torch.cuda.is_available():
        _fail(f"--device is {name}, but torch finds no GPU")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        _fail(f"--device is {name}, but torch finds {torch.cuda.device_count()} GPUs")
    return device


def _fail(message: str, code: int = 1) -> NoReturn:
    raise typer.Exit(_show_error(message, code))
