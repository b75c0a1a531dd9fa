"""One example of every builder, for the eye: `anymask show NAME` draws it, `python -m anymask.gallery` writes a page.

The page, docs/masks.md, has the code of each example, its tiles, and what packing makes of it.
"""

from __future__ import annotations

from pathlib import Path

import torch

import anymask
from anymask import BlockMask, Mask, viz

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
    target = Path("docs/masks.md")
    target.write_text(page())
    print(f"wrote {target}")
