"""Training steps of models of Hugging Face transformers, made from configurations: nothing is downloaded.

A model gets what a user gives it, numbers of positions or a padding mask, and its attention implementation makes the
mask of that, in every forward pass. All weights are of one seed, and all steps are of one batch.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anymask.integrations import transformers as integration
from benchmarks import check
from benchmarks.cases import Case
from benchmarks.masks import Shape

RATE = 1e-4
# most that a loss may differ from sdpa's at the same step, in parts of it, and in times what two runs of sdpa do
LOSS_LIMIT, LOSS_RUNS = 0.01, 3
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and the labels."""

    case: Case
    arguments: dict[str, Tensor]

    @property
    def device(self) -> str:
        """Where the tensors are: "cuda" or "cpu"."""
        return self.arguments["input_ids"].device.type


class Training:
    """A model and its optimizer."""

    def __init__(self, batch: Batch, implementation: str, dtype: torch.dtype) -> None:
        self.batch, case = batch, batch.case
        assert case.model is not None
        torch.manual_seed(0)
        made = KINDS[case.model.kind](case, implementation)
        self.model = made.to(device=batch.device, dtype=dtype).train()
        # torch's fused step has one launch for all weights
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)

    def backward(self) -> Tensor:
        """The loss, once its gradients are in the weights."""
        loss: Tensor = self.model(**self.batch.arguments).loss
        loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        """The loss before the step."""
        self.optimizer.zero_grad()
        loss = self.backward()
        self.optimizer.step()
        return loss

    def gradients(self) -> Gradients:
        """Those of the first loss, by the name of the weight."""
        self.optimizer.zero_grad()
        self.backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


@dataclass(frozen=True)
class Expected:
    """What a right implementation gives."""

    # of sdpa in fp32, and the yardstick: of sdpa in the dtype of the case
    gradients: tuple[Gradients, Gradients]
    # of sdpa in the dtype of the case, `[2, steps]`: of two runs, as its gradients are not repeatable
    losses: Tensor


def make_batch(case: Case, device: str, seed: int = 0) -> Batch:
    """Random tokens in the documents, or with the padding, of the case's mask."""
    s, model = case.shape, case.model
    assert model is not None
    assert case.mask is not None
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(model.vocab, (s.batch, s.q_len), generator=generator, device=device)
    # the mask is the same for all heads: what each token attends to
    seen = case.mask.dense(s, generator)[:, 0].expand(s.batch, -1, -1)
    if model.kind == "bert":
        keep = seen[:, 0]
        return Batch(case, {"input_ids": ids, "attention_mask": keep, "labels": ids.where(keep, -100)})
    # as many tokens before it in its document as it attends to, less itself
    return Batch(case, {"input_ids": ids, "position_ids": seen.sum(-1) - 1, "labels": ids})


def expected(batch: Batch, with_mask: bool = True) -> Expected:
    """By sdpa, in fp32 and in the dtype of the case."""
    exact = Training(batch, "sdpa", torch.float32).gradients()
    usual, again = (Training(batch, "sdpa", batch.case.shape.dtype) for _ in range(2))
    return Expected((exact, usual.gradients()), torch.stack([losses(usual), losses(again)]))


def losses(training: Training) -> Tensor:
    """fp64 `[steps]`, on the host."""
    model = training.batch.case.model
    assert model is not None
    return torch.stack([training.step() for _ in range(model.steps)]).double().cpu()


def errors(training: Training, wanted: Expected) -> check.Errors:
    """How far the first gradients are from fp32's, of all weights and of the worst, and losses from sdpa's."""
    found, (exact, usual) = training.gradients(), wanted.gradients
    assert found.keys() == exact.keys() == usual.keys()
    mine, of_sdpa = (_distances(some, exact) for some in (found, usual))
    eps = torch.finfo(training.batch.case.shape.dtype).eps
    allowed = {name: max(check.LIMIT * off, check.FLOOR * eps) for name, off in of_sdpa.items()}
    worst = torch.tensor([mine[name] / allowed[name] for name in mine]).max()
    first, again = wanted.losses
    loss, noise = (float((some / first - 1).abs().max()) for some in (losses(training), again))
    return check.Errors(
        {"grad": mine[""], "loss": loss},
        {"grad": float(worst), "loss": loss / max(LOSS_LIMIT, LOSS_RUNS * noise)},
        {"grad": mine[""] / max(of_sdpa[""], eps / 8)},
    )


def _distances(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Relative error of each gradient, and of all by the name ""."""
    off = {name: float((g.double() - exact[name]).norm()) for name, g in found.items()}
    size = {name: float(exact[name].double().norm()) for name in found}
    parts = {name: off[name] / (size[name] or 1.0) for name in found}
    return parts | {"": math.hypot(*off.values()) / math.hypot(*size.values())}


def _llama(case: Case, implementation: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**_sizes(case), "num_key_value_heads": case.shape.kv_heads}
    # 8/3 of the width, to the next multiple of 256
    config = LlamaConfig(**sizes, intermediate_size=-(-sizes["hidden_size"] * 8 // 3 // 256) * 256, use_cache=False)
    made: torch.nn.Module = LlamaForCausalLM._from_config(config, attn_implementation=implementation)
    return made


def _bert(case: Case, implementation: str) -> torch.nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = _sizes(case)
    # dropout of attention is not what is measured, and draws of others would differ
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, intermediate_size=4 * sizes["hidden_size"], **without)
    made: torch.nn.Module = BertForMaskedLM._from_config(config, attn_implementation=implementation)
    return made


def _sizes(case: Case) -> dict[str, Any]:
    s: Shape = case.shape
    assert case.model is not None
    return {
        "vocab_size": case.model.vocab, "hidden_size": s.heads * s.head_dim, "num_hidden_layers": case.model.layers,
        "num_attention_heads": s.heads, "max_position_embeddings": s.q_len,
    }  # fmt: skip


KINDS: dict[str, Callable[[Case, str], torch.nn.Module]] = {"llama": _llama, "bert": _bert}


def is_there() -> bool:
    """Whether transformers is installed; anymask is registered with it then."""
    found = importlib.util.find_spec("transformers") is not None
    if found:
        integration.register()
    return found
