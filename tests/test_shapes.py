"""The names of shapes in annotations hold: jaxtyping checks them in calls of the library."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jaxtyping")

CALLS = """
import tests.helpers.shape_checker as checker
from jaxtyping import TypeCheckError, install_import_hook
install_import_hook("anymask", "tests.helpers.shape_checker.check_shapes")
import torch
import anymask
from anymask.block_mask.bits import pack_bits

q, k, v = (torch.randn(2, heads, 140, dim, requires_grad=True) for heads, dim in ((4, 16), (2, 16), (2, 24)))
ids = torch.arange(280).view(2, 140) // 50
dense = torch.rand(2, 1, 140, 140) < 0.5
lazy = anymask.causal() & anymask.document(ids) | ~anymask.sliding_window(20)
for mask in (None, dense, lazy, anymask.pack(lazy, q_len=140, kv_len=140), anymask.from_dense(dense) & lazy):
    for backend in ("cpu", "reference"):
        o, lse = anymask.attention(q, k, v, mask, return_lse=True, backend=backend)
        (o.sum() + lse.sum()).backward()
long = anymask.pack(anymask.causal(), q_len=300, kv_len=300)
anymask.extend(long, anymask.causal(), q_len=400, kv_len=400)
anymask.slice_queries(long, 100, 300)

for wrong in (torch.zeros(2, 128, 127, dtype=torch.bool), torch.zeros(2, 128, 128)):
    try:
        pack_bits(wrong)
    except TypeCheckError:
        continue
    raise AssertionError(f"{wrong.shape}, {wrong.dtype} is taken")
print(*sorted(checker.CHECKED))
"""


def test_shapes_are_what_annotations_say() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"attention", "pack_bits", "unpack_bits", "tile_words", "Operator.classify"} <= set(done.stdout.split())
