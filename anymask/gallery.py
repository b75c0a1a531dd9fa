"""One example of every builder, for the eye: `anymask show NAME` draws it, `python -m anymask.gallery` writes pages.

docs/masks.md has the code of each example, its tiles, and what packing makes of it; docs/scores.md has the code of each
bias, what the kernels read of it, and a picture of it beside a mask.
"""

from __future__ import annotations

from pathlib import Path

import torch

import anymask
from anymask import Bias, BlockMask, Mask, viz

# queries and keys of every example
LENGTH = 1024
# name -> the expression that makes it
EXAMPLES = {
    "causal": "causal()",
    "causal_lower_right": "causal_lower_right()",
    "sliding_window": "sliding_window(256)",
    "dilated": "dilated(64, 8)",
    "strided": "strided(128)",
    "chunked": "causal() & chunked(256)",
    "document": "causal() & document(cu_seqlens=torch.tensor([0, 300, 550, 1024]))",
    "document_window": (
        "document_window(torch.tensor([0, 300, 550, 1024]), 200, kv_cu_seqlens=torch.tensor([0, 500, 750, 1024]))"
    ),
    "key_padding": "key_padding(torch.tensor([700]))",
    "prefix_lm": "prefix_lm(300)",
    "spans": "causal() | spans(torch.arange(1024) // 256 * 256, torch.arange(1024) // 256 * 256 + 200)",
    "global_tokens": "sliding_window(128, 128) | global_tokens(64)",
    "shared_prefix": "causal() & shared_prefix(torch.tensor([0] * 400 + [1] * 300 + [2] * 324))",
    "shared_question": "causal() & shared_question(torch.arange(1024) // 512, torch.arange(1024) // 128 % 4)",
    "tree": "tree((torch.arange(1024) - 1) // 2)",
    "block_diffusion": "block_diffusion(64, 512)",
    "neighbourhood_2d": "neighbourhood_2d((32, 32), 9)",
    "neighbourhood_3d": "neighbourhood_3d((16, 8, 8), 3)",
    "block_sparse": "block_sparse(torch.eye(8).bool() | torch.eye(8).bool().flip(0), 128)",
    "random_blocks": "random_blocks(1024, 1024, 0.3, generator=torch.Generator().manual_seed(0))",
    "from_dense": "from_dense((torch.arange(1024) % 300 < 200)[None, :])",
    "from_function": "from_function(lambda b, h, q_idx, kv_idx: (q_idx // 200 + kv_idx // 200) % 2 == 0)",
}

# docs/scores.md is written by hand up to here, and below by `scores_page`
MARK = "<!-- examples of python -m anymask.gallery -->\n"
# queries, keys and heads of every bias
BIAS_LENGTH, BIAS_HEADS = 64, 8
# name -> the expression that makes it, for a seed of 0, and the mask beside it
BIASES = {
    "alibi": ("alibi(2.0 ** -torch.arange(1, 9))", "causal()"),
    "relative": ("relative(torch.randn(8, 127).cumsum(1) / 8)", "sliding_window(20, 20)"),
    "relative_buckets": ("relative_buckets(torch.randn(32, 8), max_distance=64)", "key_padding(torch.tensor([50]))"),
    "relative_2d": ("relative_2d(torch.randn(15 * 15, 8), 8, 8)", "neighbourhood_2d((8, 8), 5)"),
    "low_rank": ("low_rank(torch.randn(64, 2), torch.randn(64, 2))", "document(torch.arange(64) // 25)"),
    "from_score_mod": (
        "from_score_mod(lambda score, b, h, q_idx, kv_idx: score + torch.cos((q_idx - kv_idx) / 4 + h))",
        "causal()",
    ),
    "Bias": ("alibi(2.0 ** -torch.arange(1, 9)) + torch.randn(64)", "causal() & document(torch.arange(64) // 25)"),
}


def bias_example(name: str) -> tuple[Bias, BlockMask]:
    """The bias of an example, and the mask beside it packed for `BIAS_LENGTH` queries and keys."""
    known = {**vars(anymask), "torch": torch}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        bias, mask = (eval(code, known) for code in BIASES[name])
    return bias, anymask.pack(mask, q_len=BIAS_LENGTH, kv_len=BIAS_LENGTH)


def scores_page(text: str) -> str:
    """docs/scores.md, of which `text` is the part by hand: with an example of every bias below the mark."""
    q = torch.zeros(1, BIAS_HEADS, BIAS_LENGTH, 64)
    parts = [text.partition(MARK)[0] + MARK]
    for name, (code, mask_code) in BIASES.items():
        bias, block_mask = bias_example(name)
        summary = " ".join((getattr(anymask, name).__doc__ or "").strip().split("\n\n")[0].split())
        read = anymask.explain(q, q, q, block_mask, bias=bias).scores or "8 more columns of q and k"
        parts.append(
            f"### {name}\n\n{summary}\n\n"
            f"```python\nbias = {code}\no = attention(q, k, v, {mask_code}, bias=bias)\n```\n\n"
            f"![{name} beside its mask](pictures/bias_{name.lower()}.png)\n\nKernels read: {read}.\n"
        )
    return "\n".join(parts)


def draw_biases(folder: Path) -> None:
    """The pictures of docs/scores.md."""
    from PIL import Image

    for name in BIASES:
        bias, block_mask = bias_example(name)
        added = bias.to_dense(BIAS_LENGTH, BIAS_LENGTH, q_heads=BIAS_HEADS)[0, 0]
        target = folder / f"bias_{name.lower()}.png"
        viz.plot_bias(added, block_mask, target, title=name)
        with Image.open(target) as picture:
            # an eighth of the bytes
            few = picture.convert("P", palette=Image.Palette.ADAPTIVE)
        few.save(target, optimize=True)


def example(name: str) -> Mask:
    """The mask of an example, for `LENGTH` queries and keys."""
    # an expression of this file, in the names that a user has
    mask: Mask = eval(EXAMPLES[name], {**vars(anymask), "torch": torch})
    return mask


def packed(name: str) -> BlockMask:
    """The example packed."""
    return anymask.pack(example(name), q_len=LENGTH, kv_len=LENGTH)


def page() -> str:
    """docs/masks.md."""
    parts = [
        "# Masks by name\n\nWritten by `python -m anymask.gallery`. Every mask has 1024 queries (down) and 1024 keys, "
        f"in tiles of 128 x 128:\n{viz.LEGEND}. Names are those of `anymask`; combine masks with `&`, `|` and `~`.\n"
        "Full descriptions are in the docstrings, pictures of tokens in `anymask show NAME -o mask.png`.\n"
    ]
    for name, code in EXAMPLES.items():
        block_mask = packed(name)
        stats, summary = block_mask.stats(), (getattr(anymask, name).__doc__ or "").strip().split("\n\n")[0]
        summary = " ".join(summary.split())
        cost = (
            f"{stats.density:.1%} of pairs, {stats.partial} partial and {stats.full} full tiles of "
            f"{stats.partial + stats.full + stats.empty}, {stats.nbytes:,} bytes"
        )
        tiles = viz.to_text(block_mask)
        parts.append(f"## {name}\n\n{summary}\n\n```python\n{code}\n```\n\n```text\n{tiles}\n```\n\n{cost}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    masks, scores = Path("docs/masks.md"), Path("docs/scores.md")
    masks.write_text(page())
    scores.write_text(scores_page(scores.read_text()))
    draw_biases(Path("docs/pictures"))
    print(f"wrote {masks} and {scores}")
