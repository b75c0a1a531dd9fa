"""`attention_varlen` and the calls of flash-attn, beside fp64 attention of each document by itself."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import anymask
from anymask import alibi, attention, attention_varlen, causal, document, forget, pack, packing
from anymask.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func
from anymask.packing import cache

# documents of queries and of keys; one is empty, one has no keys, one crosses a tile
Q_LENS, K_LENS = (5, 0, 130, 1, 9), (5, 3, 140, 7, 0)
WINDOWS: list[Any] = [(False, None), (True, None), (True, (4, 0)), (False, (3, 2)), (False, (-1, 1)), (True, (6, 9))]


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def packed(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def expected(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`(o, lse)` of one document `[tokens, heads, dim]` by the formula."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~seen, -torch.inf)
    p = torch.where(seen, s.softmax(-1), 0)
    return torch.einsum("hqk,khd->qhd", p, v), s.logsumexp(-1)


def window_of(n: int, m: int, is_causal: bool, window: Any) -> Tensor:
    """bool `[n, m]`: flash-attn's definition, lower-right."""
    left, right = window or (-1, -1)
    right = 0 if is_causal else right
    distance = torch.arange(m) - (torch.arange(n)[:, None] + m - n)
    return (distance >= (-left if left >= 0 else -m - n)) & (distance <= (right if right >= 0 else m + n))


@pytest.mark.parametrize(("is_causal", "window"), WINDOWS)
def test_documents_are_those_of_flash_attn(is_causal: bool, window: Any) -> None:
    q, k, v = packed((145, 4, 8), (155, 2, 8), (155, 2, 6))
    extra = torch.rand(145, 155) < 0.7
    for mask in (None, extra):
        o, lse = attention_varlen(
            q, k, v, bounds(Q_LENS), bounds(K_LENS), mask, causal=is_causal, window=window, scale=0.3, return_lse=True
        )
        assert (o.shape, lse.shape, o.is_contiguous()) == ((145, 4, 6), (4, 145), True)
        parts = []
        for q_part, k_part, v_part, allowed in zip(
            q.split(Q_LENS), k.split(K_LENS), v.split(K_LENS), _blocks(extra), strict=True
        ):
            seen = window_of(len(q_part), len(k_part), is_causal, window)
            parts.append(expected(q_part, k_part, v_part, seen if mask is None else seen & allowed, 0.3))
        o_parts, lse_parts = zip(*parts, strict=True)
        torch.testing.assert_close(o, torch.cat(o_parts))
        torch.testing.assert_close(lse, torch.cat(lse_parts, 1))
        do = torch.randn_like(o)
        found = torch.autograd.grad(o, (q, k, v), do)
        for a, b in zip(found, torch.autograd.grad(torch.cat(o_parts), (q, k, v), do), strict=True):
            torch.testing.assert_close(a, torch.nan_to_num(b))


def _blocks(extra: Tensor) -> list[Tensor]:
    """The part of each document in a mask over all tokens."""
    return [rows.split(K_LENS, 1)[i] for i, rows in enumerate(extra.split(Q_LENS))]


def test_scores_of_documents_are_those_of_each() -> None:
    q, k, v = packed((145, 4, 8), (145, 2, 8), (145, 2, 6))
    slopes, sinks = packed((4,), (4,))
    given: Any = {"bias": alibi(slopes), "softcap": 2.0, "sinks": sinks, "return_lse": True}
    o, lse = attention_varlen(q, k, v, bounds(Q_LENS), causal=True, **given)
    parts = [
        attention(*(t.transpose(0, 1)[None] for t in part), causal(), **given)
        for part in zip(*(t.split(Q_LENS) for t in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(o, torch.cat([part[0][0].transpose(0, 1) for part in parts]))
    torch.testing.assert_close(lse, torch.cat([part[1][0] for part in parts], 1))


def test_one_cu_seqlens_is_for_queries_and_keys() -> None:
    q, k, v = packed(*[(150, 2, 8)] * 3)
    cu = torch.tensor([0, 50, 150])
    a = attention_varlen(q, k, v, cu, causal=True)
    mask = causal() & anymask.document(cu_seqlens=cu)
    b = anymask.attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), mask)[0].transpose(0, 1)
    assert torch.equal(a, b)


def _count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    monkeypatch.setattr(cache, "pack", lambda *args, **kwargs: made.append(1) or packing.pack(*args, **kwargs))
    forget()
    return made


def test_layers_share_one_packed_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _count(monkeypatch)
    q, k, v = packed(*[(150, 2, 8)] * 3)
    cu, ids = torch.tensor([0, 50, 150]), torch.arange(150) // 30
    with_mask = anymask.document(ids)
    for mask in (None, with_mask):
        made.clear()
        for _ in range(4):
            attention_varlen(q, k, v, cu, cu, mask, causal=True)
        assert made == [1]
    attention_varlen(q, k, v, cu, cu, causal=True, window=(3, 0))
    assert made == [1, 1]
    # a write is another mask, and the old one is forgotten
    before = attention_varlen(q, k, v, cu, cu, causal=True)
    cu[1] = 70
    after = attention_varlen(q, k, v, cu, cu, causal=True)
    assert made == [1, 1, 1]
    assert not torch.equal(before, after)
    built = len(cache.masks._built)
    assert built == 1
    del cu
    gc.collect()
    assert not cache.masks._built


def test_other_tensors_are_other_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _count(monkeypatch)
    q, k, v = packed(*[(150, 2, 8)] * 3)
    kept = [torch.tensor([0, n, 150]) for n in range(cache.MAX_BUILT + 3)]
    for cu in kept:
        attention_varlen(q, k, v, cu, causal=True)
    assert len(made) == len(kept)
    assert len(cache.masks._built) == cache.MAX_BUILT
    forget()
    assert not cache.masks._built


def test_what_counts_no_version_is_read_each_time() -> None:
    q, k, v = packed(*[(6, 2, 8)] * 3)
    forget()
    with torch.inference_mode():
        cu = torch.tensor([0, 3, 6])
        a = attention_varlen(q, k, v, cu)
        cu[1] = 2
        assert not torch.equal(a, attention_varlen(q, k, v, cu))
    assert not cache.masks._built


@pytest.mark.compile
@pytest.mark.parametrize(("is_causal", "window"), WINDOWS)
def test_compiled_without_a_break(is_causal: bool, window: Any) -> None:
    q, k, v = packed((145, 4, 8), (155, 2, 8), (155, 2, 6))
    cu_q, cu_k = bounds(Q_LENS), bounds(K_LENS)

    def call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        return attention_varlen(q, k, v, cu_q, cu_k, causal=is_causal, window=window)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, cu_q, cu_k), call(q, k, v, cu_q, cu_k))


@pytest.mark.compile
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_traced_and_exported(pre_dispatch: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, cu: Tensor) -> Tensor:
            return attention_varlen(q, q, q, cu, causal=True)

    q, cu, other = torch.randn(150, 2, 8), torch.tensor([0, 50, 150]), torch.tensor([0, 20, 150])
    traced = make_fx(Module(), tracing_mode="symbolic", pre_dispatch=pre_dispatch)(q, cu)
    # both see bounds that they were not made from
    for module in (traced, torch.export.export(Module(), (q, cu), strict=pre_dispatch).module()):
        assert torch.equal(module(q, other), Module()(q, other))


@pytest.mark.compile
def test_compiled_rows_of_padded_tokens_see_nothing() -> None:
    q = torch.randn(9, 2, 8)
    call = torch.compile(attention_varlen, backend="eager", fullgraph=True)
    o = call(q, q, q, torch.tensor([0, 2, 6]), causal=True)
    alone = attention_varlen(q[:6], q[:6], q[:6], torch.tensor([0, 2, 6]), causal=True)
    torch.testing.assert_close(o[:6], alone, atol=1e-6, rtol=1e-6)
    assert not o[6:].any()


def test_fakes_and_meta() -> None:
    q = torch.empty(7, 2, 8, device="meta")
    assert attention_varlen(q, q, q, torch.tensor([0, 3, 7], device="meta"), causal=True).shape == (7, 2, 8)
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(7, 2, 8)
        assert attention_varlen(q, q, q, torch.tensor([0, 3, 7])).shape == (7, 2, 8)


def test_scores_are_those_of_attention() -> None:
    q, cu = torch.randn(140, 2, 8), torch.tensor([0, 60, 140])
    ids = (torch.arange(140) >= 60).long()
    scores = {"bias": torch.randn(2, 140, 140), "softcap": 3.0, "sinks": torch.randn(2)}
    o, lse = attention_varlen(q, q, q, cu, causal=True, return_lse=True, **scores)
    rows = q.transpose(0, 1)[None]
    want, its = attention(rows, rows, rows, causal() & document(ids), return_lse=True, **scores)
    torch.testing.assert_close(o, want[0].transpose(0, 1))
    torch.testing.assert_close(lse, its[0])


ERRORS: list[Any] = [
    ({"q": torch.randn(1, 6, 2, 8)}, ValueError, r"q has shape \(1, 6, 2, 8\); allowed are 3 dimensions"),
    ({"cu_seqlens_q": [0, 6]}, TypeError, "cu_seqlens_q is a list; allowed is an int tensor"),
    ({"cu_seqlens_q": torch.zeros(2)}, ValueError, "cu_seqlens_q is torch.float32"),
    ({"cu_seqlens_k": torch.zeros(2, 2).long()}, ValueError, r"cu_seqlens_k is torch.int64 of shape \(2, 2\)"),
    ({"cu_seqlens_q": torch.tensor([0, 7, 6])}, ValueError, "cu_seqlens is .0, 7, 6.; allowed are numbers that start"),
    ({"cu_seqlens_q": torch.tensor([0, 5])}, ValueError, "cu_seqlens has length 5 but kv_len is 6"),
    ({"cu_seqlens_k": torch.tensor([0, 2, 6])}, ValueError, "kv_cu_seqlens has 2 documents but cu_seqlens has 1"),
    ({"causal": 1}, TypeError, "causal is 1 of type int; allowed is a bool"),
    ({"window": 3}, TypeError, "window is 3; allowed are None and a pair"),
    ({"window": (-2, 0)}, ValueError, "a bound of window is -2; allowed are 0 and more"),
    ({"mask": torch.zeros(6, 6)}, ValueError, "mask has dtype torch.float32"),
    ({"mask": pack(causal(), q_len=6, kv_len=6)}, TypeError, "mask is a BlockMask; allowed are None, a bool tensor"),
    ({"return_lse": 1}, TypeError, "return_lse is 1"),
    ({"scale": float("nan")}, ValueError, "scale is nan"),
    ({"backend": "cudnn"}, ValueError, "backend is"),
    ({"max_seqlen_q": 6}, TypeError, "max_seqlen_q is no argument; leave it out"),
    ({"window_size": (3, 0)}, TypeError, r"window_size is no argument; write window=\(before, after\)"),
    ({"softmax_scale": 0.3}, TypeError, "softmax_scale is no argument; write scale"),
    ({"is_causal": True}, TypeError, "is_causal is no argument; write causal"),
    ({"causl": True}, TypeError, "causl is no argument; allowed keywords are cu_seqlens_q, cu_seqlens_k, mask, causal"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS)
def test_errors_name_the_argument(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    q = torch.randn(6, 2, 8)
    arguments = {"q": q, "k": q, "v": q, "cu_seqlens_q": torch.tensor([0, 6]), **changes}
    with pytest.raises(kind, match=message):
        attention_varlen(**arguments)


class TestFlashAttn:
    @pytest.mark.parametrize(("is_causal", "window"), WINDOWS)
    @pytest.mark.parametrize("q_len", [140, 20])
    def test_dense(self, q_len: int, is_causal: bool, window: Any) -> None:
        q, k, v = packed((2, q_len, 4, 8), (2, 140, 2, 8), (2, 140, 2, 8))
        o, lse, nothing = flash_attn_func(
            q, k, v, 0.0, 0.2, is_causal, window or (-1, -1), deterministic=True, return_attn_probs=True
        )
        assert nothing.numel() == 0
        assert o.is_contiguous()
        seen = window_of(q_len, 140, is_causal, window)
        for i in range(2):
            for a, b in zip((o[i], lse[i]), expected(q[i], k[i], v[i], seen, 0.2), strict=True):
                torch.testing.assert_close(a, b)
        assert torch.equal(
            o, flash_attn_func(q, k, v, softmax_scale=0.2, causal=is_causal, window_size=window or (-1, -1))
        )

    def test_varlen(self) -> None:
        q, k, v = packed((145, 4, 8), (155, 2, 8), (155, 2, 8))
        cu_q, cu_k = bounds(Q_LENS), bounds(K_LENS)
        o, lse, nothing = flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, 130, 140, 0.0, 0.2, True, (9, -1), return_attn_probs=True
        )
        ours = attention_varlen(q, k, v, cu_q, cu_k, causal=True, window=(9, 0), scale=0.2, return_lse=True)
        assert torch.equal(o, ours[0])
        assert torch.equal(lse, ours[1])
        assert nothing.numel() == 0
        assert torch.equal(
            o, flash_attn_varlen_func(q, k, v, cu_q, cu_k, 130, 140, softmax_scale=0.2, causal=True, window_size=(9, 0))
        )

    @pytest.mark.parametrize("what", ["softcap", "alibi_slopes"])
    @pytest.mark.parametrize(("q_len", "kv_len"), [(140, 140), (20, 140)])
    def test_scores(self, q_len: int, kv_len: int, what: str) -> None:
        """By the words of flash-attn: `-slope |i + seqlen_k - seqlen_q - j|`, and `softcap tanh(s / softcap)`."""
        q, k, v = packed((2, q_len, 4, 8), (2, kv_len, 2, 8), (2, kv_len, 2, 8))
        slopes = torch.rand(4, requires_grad=True)
        given = {"softcap": 0.3} if what == "softcap" else {"alibi_slopes": slopes}
        i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
        scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 8**-0.5
        if what == "softcap":
            scores = 0.3 * (scores / 0.3).tanh()
        else:
            scores = scores - slopes[:, None, None] * (i + kv_len - q_len - j).abs()
        scores = scores.masked_fill(j > i + kv_len - q_len, -torch.inf)
        want = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.repeat_interleave(2, 2))
        leaves = (q, k, v) if what == "softcap" else (q, k, v, slopes)
        calls = [flash_attn_func(q, k, v, causal=True, **given)]
        if q_len == kv_len:
            rows, cu = (t.flatten(0, 1) for t in (q, k, v)), torch.tensor([0, q_len, 2 * q_len])
            o = flash_attn_varlen_func(*rows, cu, cu.clone(), q_len, q_len, causal=True, **given)
            calls.append(o.unflatten(0, (2, q_len)))
        for o in calls:
            torch.testing.assert_close(o, want)
            grads = (torch.autograd.grad(t.sin().sum(), leaves, retain_graph=True) for t in (o, want))
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)

    @pytest.mark.parametrize(("q_len", "window"), [(140, (-1, -1)), (20, (-1, -1)), (140, (30, 0))])
    def test_slopes_of_samples(self, q_len: int, window: tuple[int, int]) -> None:
        q, k, v = packed((2, q_len, 4, 8), (2, 140, 2, 8), (2, 140, 2, 8))
        slopes = torch.rand(2, 4, requires_grad=True)
        given: Any = {"causal": True, "window_size": window, "return_attn_probs": True}
        o, lse, _ = flash_attn_func(q, k, v, alibi_slopes=slopes, **given)
        want = [
            flash_attn_func(q[i : i + 1], k[i : i + 1], v[i : i + 1], alibi_slopes=slopes[i], **given) for i in range(2)
        ]
        leaves = q, k, v, slopes
        for a, b in ((o, torch.cat([w[0] for w in want])), (lse, torch.cat([w[1] for w in want]))):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
            grads = (
                torch.autograd.grad(t.sin().sum(), leaves, retain_graph=True, materialize_grads=True) for t in (a, b)
            )
            for x, y in zip(*grads, strict=True):
                torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
        for changes in ({"causal": False}, {"alibi_slopes": torch.rand(1, 4)}):
            with pytest.raises(ValueError, match=r"alibi_slopes has shape .*allowed are \[q_heads\], and with causal"):
                flash_attn_func(q, k, v, **{"causal": True, "alibi_slopes": slopes, **changes})

    def test_slopes_count_within_documents_of_equal_bounds_alone(self) -> None:
        q, k = torch.randn(6, 2, 8), torch.randn(9, 2, 8)
        cu_q, cu_k = torch.tensor([0, 6]), torch.tensor([0, 9])
        with pytest.raises(ValueError, match="cu_seqlens_q differs from cu_seqlens_k; allowed are equal ones"):
            flash_attn_varlen_func(q, k, k, cu_q, cu_k, 6, 9, alibi_slopes=torch.ones(2))

    def test_dropout(self) -> None:
        q, cu = torch.randn(140, 2, 8), torch.tensor([0, 60, 140])
        torch.manual_seed(1)
        o = flash_attn_varlen_func(q, q, q, cu, cu, 80, 80, 0.4, causal=True)
        torch.manual_seed(1)
        assert torch.equal(o, attention_varlen(q, q, q, cu, causal=True, dropout_p=0.4))
        again = flash_attn_varlen_func(q, q, q, cu, cu, 80, 80, 0.4, causal=True)
        assert not torch.equal(o, again)
        # the first query of a document has one key, whose weight is 0 or 1 / 0.6
        first = torch.stack([flash_attn_func(q[None], q[None], q[None], 0.4, causal=True)[0, 0] for _ in range(99)])
        assert set((first / q[0]).mean(2).flatten().mul(6).round().int().tolist()) == {0, 10}

    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0; allowed are numbers from 0 to below 1"),
            ({"softcap": -2.0}, ValueError, "softcap is -2.0; allowed are None and finite numbers above 0"),
            (
                {"alibi_slopes": torch.ones(1, 2)},
                ValueError,
                r"alibi_slopes has shape \(1, 2\)",
            ),
            ({"alibi_slopes": torch.ones(2), "softcap": 9.0}, ValueError, "softcap and alibi_slopes are both given"),
            ({"alibi_slopes": [1.0, 2.0]}, TypeError, "slopes is a list"),
            ({"window_size": 3}, TypeError, "window_size is 3"),
            ({"window_size": (3, -2)}, ValueError, "a bound of window_size is -2"),
            ({"causal": None}, TypeError, "causal is None"),
            ({"deterministic": 1}, TypeError, "deterministic is 1"),
        ],
    )
    def test_what_is_not_there_raises(self, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
        q, cu = torch.randn(6, 2, 8), torch.tensor([0, 6])
        with pytest.raises(kind, match=message):
            flash_attn_func(q[None], q[None], q[None], **changes)
        with pytest.raises(kind, match=message):
            flash_attn_varlen_func(q, q, q, cu, cu, 6, 6, **changes)

    def test_shapes_and_tables(self) -> None:
        q, cu = torch.randn(6, 2, 8), torch.tensor([0, 6])
        with pytest.raises(ValueError, match=r"q has shape \(6, 2, 8\); allowed are 4 dimensions"):
            flash_attn_func(q, q, q)
        with pytest.raises(ValueError, match="block_table is a tensor"):
            flash_attn_varlen_func(q, q, q, cu, cu, 6, 6, block_table=torch.zeros(1, 1))
