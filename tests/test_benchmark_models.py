"""The suite of models must see an attention that is a little wrong, and time no model with it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anymask import causal, pack
from anymask.integrations import transformers as integration
from benchmarks import cases, masks, models, run
from benchmarks.cases import BF16, Case, Model, Shape

pytest.importorskip("transformers", minversion="5.0")

MASKS = {"llama": masks.documents(3), "bert": masks.padding("padding", 1 / 4)}


@pytest.fixture(params=MASKS)
def case(request: pytest.FixtureRequest) -> Case:
    shape, model = Shape(3, 2, 48, 16, BF16), Model(request.param, layers=2, vocab=64, steps=4)
    whose = {"baselines": ("sdpa:model",), "ours": ("anymask:model",)}
    return Case(request.param, shape, MASKS[request.param], **whose, passes=("train",), model=model)


def rows_of(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, dict[str, Any]]]:
    suite = replace(cases.SUITES["models"], cases=[case], rounds=1)
    monkeypatch.setattr(run, "tiny", lambda _: suite)
    code = run.main(["--suite", "models", "--tiny", "--device", "cpu", "--out", str(tmp_path)])
    return code, {row["provider"]: row for row in json.loads((tmp_path / "models.json").read_text())["rows"]}


def test_models_are_trained_checked_and_timed(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = rows_of(case, tmp_path, monkeypatch)
    assert code == 0
    ours, sdpa = rows["anymask:model"], rows["sdpa:model"]
    assert (ours["status"], ours["step"], ours["baseline"]) == ("ok", "train", "sdpa:model")
    assert ours["ms"] > 0
    assert 0.5 < ours["error_ratios"]["grad"] < 2
    assert sdpa["errors"]["loss"] == 0
    assert f"| {case.name} |" in capsys.readouterr().out


def test_a_batch_is_what_the_mask_says(case: Case) -> None:
    given = models.make_batch(case, "cpu").arguments
    if case.name == "llama":
        assert given["position_ids"].tolist() == [[*range(16)] * 3] * 3
    else:
        assert torch.equal(given["labels"] == -100, ~given["attention_mask"])
        assert 0 < given["attention_mask"].sum() < given["attention_mask"].numel()


@pytest.mark.parametrize("fault", ["mask", "scale"])
def test_a_fault_of_the_attention_is_seen(
    fault: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = integration.attention_forward
    other = pack(causal(), q_len=48, kv_len=48)

    def faulty(module: Any, q: Any, k: Any, v: Any, mask: Any, *, scaling: float, **rest: Any) -> Any:
        changed = (other, scaling) if fault == "mask" else (mask, 2 * scaling)
        return honest(module, q, k, v, changed[0], scaling=changed[1], **rest)

    monkeypatch.setattr(integration, "attention_forward", faulty)
    code, rows = rows_of(case, tmp_path, monkeypatch)
    assert code == 1
    assert rows["anymask:model"]["status"] == "wrong"


def test_losses_that_differ_are_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.is_there()
    batch = models.make_batch(case, "cpu")
    wanted = models.expected(batch)
    assert models.errors(models.Training(batch, "anymask", BF16), wanted).right
    slower = models.Training(batch, "anymask", BF16)
    for group in slower.optimizer.param_groups:
        group["lr"] *= 50
    found = models.errors(slower, wanted)
    assert not found.right
    assert found.excess["grad"] < 1
    assert found.excess["loss"] > 1
