"""Random compositions of masks over random shapes, against the oracle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anymask import Mask, causal, causal_lower_right, from_dense, pack, sliding_window
from anymask.mask.expr import TileGrid
from anymask.mask.program import mask_from_program, program_of
from anymask.testing import MASKS, Case, assert_dead_is_zero, assert_same_block_mask, check, reference, run
from anymask.testing.cases import Inputs, make_qkv

SETTINGS = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
LENGTHS = st.one_of(st.integers(1, 300), st.sampled_from([1, 127, 128, 129, 255, 256, 257]))
COUNTS = st.tuples(st.integers(1, 3), st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (3, 1), (6, 2)]))


@st.composite
def _dense_leaf(draw: st.DrawFn, batch: int, heads: int, q_len: int, kv_len: int) -> Mask:
    shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, q_len, kv_len)]
    density = draw(st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.99, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    tensor = torch.rand(shape, generator=generator) < density
    if draw(st.booleans()):
        tensor = tensor.mT.contiguous().mT
    return from_dense(tensor)


@st.composite
def _masks(draw: st.DrawFn, batch: int, heads: int, q_len: int, kv_len: int) -> Mask:
    longest = max(q_len, kv_len)
    leaf = st.one_of(
        st.builds(causal, offset=st.integers(-longest, longest)),
        st.just(causal_lower_right()),
        st.builds(sliding_window, st.integers(0, longest), st.integers(0, longest)),
        _dense_leaf(batch, heads, q_len, kv_len),
    )
    return draw(
        st.recursive(
            leaf,
            lambda inner: st.one_of(
                inner.map(lambda m: ~m),
                st.tuples(inner, inner).map(lambda ms: ms[0] & ms[1]),
                st.tuples(inner, inner).map(lambda ms: ms[0] | ms[1]),
            ),
            max_leaves=5,
        )
    )


def _meaning(mask: Mask, batch: int, heads: int, q_len: int, kv_len: int) -> torch.Tensor:
    index = torch.meshgrid(*(torch.arange(n) for n in (*mask.planes, q_len, kv_len)), indexing="ij")
    return mask.evaluate(TileGrid(q_len, kv_len, torch.device("cpu")), *index).expand(batch, heads, -1, -1)


@given(st.data(), COUNTS, LENGTHS, LENGTHS)
@SETTINGS
def test_packing_keeps_every_pair(
    data: st.DataObject, counts: tuple[int, tuple[int, int]], q_len: int, kv_len: int
) -> None:
    batch, (heads, _) = counts
    mask = data.draw(_masks(batch, heads, q_len, kv_len))
    packed = pack(mask, q_len=q_len, kv_len=kv_len)
    dense = _meaning(mask, batch, heads, q_len, kv_len)
    assert torch.equal(packed.to_dense().expand_as(dense), dense)
    planes = dense[: packed.batch, : packed.heads]
    assert_same_block_mask(packed, pack(planes))
    assert packed.density() == pytest.approx(planes.double().mean().item(), abs=1e-12)
    program = program_of(mask)
    assert program is not None
    assert_same_block_mask(packed, pack(mask_from_program(*program), q_len=q_len, kv_len=kv_len))


@given(st.data(), COUNTS, LENGTHS, LENGTHS, st.sampled_from([1, 7, 16, 33]), st.sampled_from([None, -0.7, 0.0, 2.0]))
@SETTINGS
def test_composed_masks(
    data: st.DataObject,
    counts: tuple[int, tuple[int, int]],
    q_len: int,
    kv_len: int,
    dim: int,
    scale: float | None,
) -> None:
    batch, (heads, kv_heads) = counts
    mask = data.draw(_masks(batch, heads, q_len, kv_len))
    dense = _meaning(mask, batch, heads, q_len, kv_len)
    # fp64 leaves no room for a wrong pair
    q, k, v = make_qkv(batch, heads, kv_heads, q_len, kv_len, dim, dtype=torch.float64, requires_grad=True)
    inputs = Inputs(q, k, v, mask, dense, torch.randn(q.shape, dtype=torch.float64), torch.randn(q.shape[:3]))
    results = run(inputs, scale, backend="cpu")
    for got, want in zip(results, reference(q, k, v, dense, scale, inputs.do, inputs.dlse), strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)
    assert_dead_is_zero(results, dense)


@given(
    st.sampled_from(sorted(MASKS)),
    COUNTS,
    LENGTHS,
    LENGTHS,
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from(["contiguous", "blhd", "packed", "transposed", "expanded"]),
)
@SETTINGS
def test_named_masks(
    name: str,
    counts: tuple[int, tuple[int, int]],
    q_len: int,
    kv_len: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    layout: str,
) -> None:
    batch, (heads, kv_heads) = counts
    check(Case(name, q_len, kv_len, dims[0], dtype, dims[1], batch, heads, kv_heads, layout), "cpu")
