"""The one rule that says how close is close enough, and what must be exact."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from anymask.block_mask import BlockMask, TileLists
from anymask.testing.oracle import Results


@dataclass(frozen=True)
class Record:
    """One comparison: the error as a share of what rule `kind` takes as its unit; `limit` is the largest allowed."""

    what: str
    dtype: torch.dtype
    # "max" or "rmse"
    kind: str
    ratio: float
    limit: float


# every comparison of `assert_matches` in this process since the list was last cleared
RECORDS: list[Record] = []

MAX_ERROR_LIMIT = 2.0
RMSE_LIMIT = 1.1
# for an RMSE to say anything
FEWEST_ROWS = 9
LSE_ERROR_LIMIT = 1e-3


class _Expected(NamedTuple):
    """Figures of what a result is compared with. Of lse only `largest` is read."""

    # the largest of expected, of its magnitudes, and of the error of eager
    largest: float
    magnitude: float
    eager_error: float
    eager_rms: float
    # RMSE of `expected` rounded once to the dtype
    rounding: float
    rows: float
    squares: float
    fourths: float


class _Actual(NamedTuple):
    """Figures of a result: elements that are not finite, or of lse -inf in another place, and its error."""

    not_finite: float
    misplaced: float
    error: float
    rms: float


class Judge:
    """The rule of `assert_matches` for any number of results of one call; on a GPU each waits for the host once."""

    def __init__(
        self,
        expected: Results,
        eager: Results,
        magnitudes: Results,
        dtype: torch.dtype,
        dense: Tensor,
        rows: int | None = None,
    ) -> None:
        """Take what the call should give and the yardsticks.

        Args:
            expected, eager, magnitudes: of one call, by the functions of these names.
            dtype: of the call's q.
            dense: the mask, bool `[batch, q_heads, q_len, kv_len]`.
            rows: whose errors are independent; default the queries with a key, or the keys with a query if fewer.
        """
        self._expected, self._dtype = expected, dtype
        figures = [
            _figures_of_expected(x, y, z, dtype, what)
            for what, x, y, z in zip(Results._fields, expected, eager, magnitudes, strict=True)
        ]
        self._figures = torch.stack(figures)
        has_key, has_query = dense.any(-1), dense.any(-2)
        # the errors of one query reach every key it sees, and those of one key every query that sees it
        self._rows = torch.minimum(has_key.sum(), has_query.sum()).double()
        if rows is not None:
            self._rows = self._rows.clamp(max=rows)
        self._unused_rows = ~has_key
        self._unused_keys = ~torch.unflatten(has_query, 1, (expected.dk.shape[1], -1)).any(2)

    def __call__(self, results: Results) -> list[Record]:
        """Assert that results match, and are exactly 0 where nothing attends; return the comparisons."""
        for what, actual, expected in zip(Results._fields, results, self._expected, strict=True):
            _check_form(actual, expected, self._dtype, what)
        got = torch.stack([_figures_of_actual(*pair) for pair in zip(results, self._expected, strict=True)])
        unused = torch.stack(_count_unused(results, self._unused_rows, self._unused_keys)).double()
        rows, *numbers = torch.cat([self._rows[None], unused, self._figures.flatten(), got.flatten()]).tolist()
        counts, numbers = numbers[: len(_UNUSED)], numbers[len(_UNUSED) :]
        before = len(RECORDS)
        n, n_got = len(_Expected._fields), len(_Actual._fields)
        for i, what in enumerate(Results._fields):
            if not results[i].numel():
                continue
            of_expected = _Expected(*numbers[i * n : (i + 1) * n])._replace(rows=rows)
            of_actual = _Actual(*numbers[len(Results._fields) * n :][i * n_got : (i + 1) * n_got])
            _judge(results[i], self._expected[i], self._dtype, what, of_expected, of_actual)
        _check_unused(counts)
        return RECORDS[before:]


def assert_matches(
    actual: Tensor,
    expected: Tensor,
    eager: Tensor | None,
    dtype: torch.dtype,
    what: str,
    rows: int | None = None,
    magnitude: Tensor | None = None,
) -> float:
    """Assert that `actual` is as close to fp64 as same-dtype eager torch is; return the ratio of the maximum errors.

    Shapes equal, every element finite, and

    - 16-bit: `max|actual - expected| <= 2 * (max|eager - expected| + eps * max|expected|)`, and
      `rmse(actual) <= 1.1 * max(rmse(eager), rounding)`;
    - fp32: the first of these, with `magnitude` for `expected` on the right;
    - fp64: `max|actual - expected| <= 1e-12 * max(1, max|expected|)`;
    - lse, for every dtype: `|actual - expected| <= 1e-3` (plus fp32's own spacing), -inf at exactly the same places.

    `rounding` is the error that no implementation can avoid: the RMSE of `expected` rounded once to the dtype.
    With few rows the eager error is itself a poor estimate: rounding errors are shared along a row, and the ratio of
    the RMSE of two equally good results of n rows has a standard deviation of `1 / sqrt(n)`. So both limits are at
    least `1 + 3 / sqrt(n)`: 1.1 stands from 900 rows on, 2 from 9. Nor is n larger than the number of elements that
    make up the squares of `expected`, their sum squared over the sum of their squares: where few elements are large,
    the RMSE is how those were rounded. With n below 9 it is not judged: of two equally good gradients of two keys and
    one dimension, every tenth has 3 times the RMSE of the other. In fp32, where nothing is rounded to 16 bits and the
    largest error is that of one row whose gradient is the difference of large terms, those terms set the floor. So does
    the rounding of lse, from which a backward pass computes p, where the magnitudes count it.

    Args:
        actual: the tensor under test, dtype `dtype` (lse: fp32, or fp64 for fp64 inputs).
        expected: fp64 from `reference`.
        eager: from `eager`; not read for lse and fp64.
        what: a name of `Results`, for messages.
        rows: n, the rows whose errors are independent; default the non-zero rows of `expected`.
        magnitude: from `magnitudes`; default `expected`, which is the stricter.
    """
    if what not in Results._fields:
        raise ValueError(f"what is {what!r}; allowed are {Results._fields}")
    expected = expected.double()
    _check_form(actual, expected, dtype, what)
    if actual.numel() == 0:
        return 0.0
    if what == "lse" or dtype == torch.float64:
        eager = expected
    assert eager is not None, "eager is None; it is needed for every dtype but fp64"
    assert eager.shape == expected.shape, f"eager {what} has shape {tuple(eager.shape)}"
    figures = _figures_of_expected(expected, eager, expected if magnitude is None else magnitude, dtype, what)
    numbers = torch.cat([figures, _figures_of_actual(actual, expected)]).tolist()
    of_expected = _Expected(*numbers[: len(_Expected._fields)])
    if rows is not None:
        of_expected = of_expected._replace(rows=rows)
    return _judge(actual, expected, dtype, what, of_expected, _Actual(*numbers[len(_Expected._fields) :]))


def _check_form(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    assert actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    kept_dtype = dtype if what != "lse" else torch.promote_types(dtype, torch.float32)
    assert actual.dtype == kept_dtype, f"{what} has dtype {actual.dtype}, expected {kept_dtype}"


def _figures_of_expected(expected: Tensor, eager: Tensor, magnitude: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`_Expected` as a tensor, in the order of its fields, so that nothing waits for a GPU."""
    if expected.numel() == 0:
        return expected.new_zeros(len(_Expected._fields))
    if what == "lse":
        largest = expected.masked_fill(expected == -math.inf, 0.0).abs().max()
        return torch.cat([largest[None], largest.new_zeros(len(_Expected._fields) - 1)])
    eager_error = (eager.double() - expected).abs()
    squares = expected.square()
    figures = {
        "largest": expected.abs().max(),
        "magnitude": magnitude.abs().max().double(),
        "eager_error": eager_error.max(),
        "eager_rms": _rms(eager_error),
        "rounding": _rms(expected.to(dtype).double() - expected),
        "rows": (expected != 0).any(-1).sum().double(),
        "squares": squares.sum(),
        "fourths": squares.square().sum(),
    }
    return torch.stack([figures[name] for name in _Expected._fields])


def _figures_of_actual(actual: Tensor, expected: Tensor) -> Tensor:
    """`_Actual` as a tensor, in the order of its fields."""
    if actual.numel() == 0:
        return expected.new_zeros(len(_Actual._fields))
    got, no_key = actual.detach().double(), expected == -math.inf
    not_finite, misplaced = ~torch.isfinite(got) & ~no_key, no_key != (got == -math.inf)
    # both -inf, or judged by the counts
    error = (got - expected).masked_fill(no_key | misplaced | not_finite, 0.0).abs()
    figures = {
        "not_finite": not_finite.sum().double(),
        "misplaced": misplaced.sum().double(),
        "error": error.max(),
        "rms": _rms(error),
    }
    return torch.stack([figures[name] for name in _Actual._fields])


def _judge(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str, size: _Expected, found: _Actual) -> float:
    """The rule, from figures; the tensors are read for the message of a failure alone."""
    got = actual.detach().double()
    if found.misplaced and what == "lse":
        wrong = (expected == -math.inf) != (got == -math.inf)
        raise AssertionError(f"lse: -inf in the wrong places, first at {_first(wrong)}")
    if found.not_finite:
        bad = ~torch.isfinite(got) & (expected != -math.inf)
        count = f"{int(found.not_finite)} of {got.numel()}"
        raise AssertionError(f"{what}: {count} elements not finite, first at {_first(bad)}")

    def compare(kind: str, value: float, unit: float, limit: float) -> float:
        ratio = value / unit if unit else (0.0 if value == 0 else math.inf)
        RECORDS.append(Record(what, dtype, kind, ratio, limit))
        if not ratio <= limit:
            error = (got - expected).abs().nan_to_num(0.0)
            raise AssertionError(
                f"{what}: {kind} error {value:.3e} is {ratio:.3f} units of {unit:.3e}, allowed are {limit:.3f}; "
                f"the largest error {float(error.max()):.3e} is at {_first(error == error.max())}"
            )
        return ratio

    if what == "lse":
        unit = LSE_ERROR_LIMIT + 2 * torch.finfo(torch.float32).eps * size.largest
        return compare("max", found.error, unit, 1.0)
    if dtype == torch.float64:
        return compare("max", found.error, 1e-12 * max(1.0, size.largest), 1.0)
    rows = min(size.rows, int(size.squares**2 / max(size.fourths, 1e-300)))
    noise = 1 + 3 / math.sqrt(max(rows, 1))
    if dtype != torch.float32 and rows >= FEWEST_ROWS:
        compare("rmse", found.rms, max(size.eager_rms, size.rounding), max(RMSE_LIMIT, noise))
    largest = size.magnitude if dtype == torch.float32 else size.largest
    unit = size.eager_error + torch.finfo(dtype).eps * largest
    return compare("max", found.error, unit, max(MAX_ERROR_LIMIT, noise))


# (a field of `Results`, whether it is counted by keys)
_UNUSED = (("o", False), ("dq", False), ("dk", True), ("dv", True), ("lse", False))


def assert_unused_is_zero(results: Results, dense: Tensor) -> None:
    """Assert that o and dq of queries without a key, and dk and dv of keys that no query sees, are exactly 0.

    Args:
        dense: bool `[batch, q_heads, q_len, kv_len]`.
    """
    unused_keys = ~torch.unflatten(dense.any(-2), 1, (results.dk.shape[1], -1)).any(2)
    _check_unused(torch.stack(_count_unused(results, ~dense.any(-1), unused_keys)).tolist())


def _count_unused(results: Results, unused_rows: Tensor, unused_keys: Tensor) -> list[Tensor]:
    """For each of `_UNUSED` the elements that are not 0 (lse: not -inf) where nothing attends."""
    return [
        ((results.lse != -math.inf) & unused_rows).sum()
        if what == "lse"
        else ((getattr(results, what) != 0) & (unused_keys if by_key else unused_rows)[..., None]).sum()
        for what, by_key in _UNUSED
    ]


def _check_unused(counts: list[float]) -> None:
    for (what, _), count in zip(_UNUSED, counts, strict=True):
        wrong = "values but -inf where a query has no key" if what == "lse" else "non-zeros where nothing attends"
        assert not count, f"{what}: {int(count)} {wrong}"


def _rms(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()


def _first(hit: Tensor) -> list[int]:
    return [int(i) for i in hit.nonzero()[0]]


def assert_same_block_mask(a: BlockMask, b: BlockMask) -> None:
    """Assert that two packed masks agree in every field: every field of both views, exactly."""
    assert (a.q_len, a.kv_len) == (b.q_len, b.kv_len), f"lengths {a.q_len, a.kv_len} and {b.q_len, b.kv_len}"
    for view in ("rows", "cols"):
        for field in fields(TileLists):
            name = f"{view}.{field.name}"
            x, y = (getattr(getattr(m, view), field.name) for m in (a, b))
            assert x.dtype == y.dtype, f"{name} has dtypes {x.dtype} and {y.dtype}"
            assert x.shape == y.shape, f"{name} has shapes {tuple(x.shape)} and {tuple(y.shape)}"
            differs = x.cpu() != y.cpu()
            assert not differs.any(), f"{name} differs in {int(differs.sum())} elements, first at {_first(differs)}"
