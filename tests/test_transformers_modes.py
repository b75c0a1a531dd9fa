"""Ways to run a model of transformers: attention by part of it and switched, weights asked for, ways to generate."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from anymask.integrations import transformers as integration
from tests.helpers.models import DECODERS, ENCODER, SMALL, T5, padded, twins
from tests.test_transformers import MODELS, SEQ2SEQ, inputs_of

transformers = pytest.importorskip("transformers", minversion="5.0")
integration.register()

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the queries of all calls of attention."""
    found: list[int] = []
    honest = integration.attention
    monkeypatch.setattr(integration, "attention", lambda q, *a, **k: found.append(q.shape[2]) or honest(q, *a, **k))
    return found


def _decoder(name: str, implementation: str = "anymask") -> nn.Module:
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **DECODERS[name]})
    torch.manual_seed(0)
    made: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return made.eval()


# an image of 4 patches in a text of 12 tokens, of which two layers attend
@pytest.mark.parametrize(
    ("parts", "lengths"),
    [
        ("anymask", [4, 12, 12]),
        ({"text_config": "anymask", "vision_config": "sdpa"}, [12, 12]),
        ({"text_config": "sdpa", "vision_config": "anymask"}, [4]),
    ],
    ids=str,
)
def test_parts_of_a_model(parts: Any, lengths: list[int], calls: list[int]) -> None:
    changes, kinds, pick = MODELS["Gemma3ForConditionalGeneration"]
    found = []
    for implementation in ("sdpa", parts):
        torch.manual_seed(0)
        config = transformers.Gemma3Config(**copy.deepcopy(changes))
        model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=implementation)
        found.append(pick(model.eval()(**inputs_of(kinds))))
    assert calls == lengths
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=2e-5)


def test_a_model_that_is_switched(calls: list[int]) -> None:
    model, inputs = _decoder("mistral", "sdpa"), padded("left")
    keep = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[keep]
    for implementation, layers in (("anymask", 2), ("eager", 0), ("anymask", 2), ("sdpa", 0)):
        calls.clear()
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(**inputs).logits[keep], expected, atol=2e-5, rtol=2e-5)
        assert len(calls) == layers


# llama passes the wish on to its layers, the others record what those return
@pytest.mark.parametrize(
    ("name", "compiled"),
    [("llama", False), ("gpt2", False), ("opt", False), pytest.param("gpt2", True, marks=pytest.mark.compile)],
)
def test_weights_are_refused(name: str, compiled: bool) -> None:
    model = _decoder(name)
    torch.compiler.reset()
    run = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(ValueError, match="Attention asks for output_attentions; anymask has no weights"):
        run(**padded("right"), output_attentions=True)
    # the hooks of what was asked for stay
    assert run(**padded("right"), output_hidden_states=True).hidden_states[-1].isfinite().all()


def test_weights_of_a_part_are_refused() -> None:
    changes, kinds, _ = MODELS["SiglipModel"]
    model = transformers.SiglipModel._from_config(
        transformers.SiglipConfig(**copy.deepcopy(changes)), attn_implementation="anymask"
    )
    with pytest.raises(ValueError, match="SiglipAttention asks for output_attentions"):
        model(**inputs_of(kinds), output_attentions=True)


@pytest.mark.parametrize(
    ("name", "cache"), [("Bart", "dynamic"), ("Bart", "static"), ("T5", "dynamic"), ("EncoderDecoder", "dynamic")]
)
def test_the_padding_of_an_encoder_is_not_seen(name: str, cache: str) -> None:
    if name == "EncoderDecoder":
        parts = [transformers.BertConfig(**ENCODER, is_decoder=n, add_cross_attention=n) for n in (False, True)]
        config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
        config.pad_token_id, config.decoder_start_token_id = 0, 1
        models = twins(transformers.EncoderDecoderModel, config)
    else:
        made = getattr(transformers, f"{name}ForConditionalGeneration")
        models = twins(made, made.config_class(**(T5 if name == "T5" else SEQ2SEQ)), beside="eager")
    inputs = padded("right")
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True, "cache_implementation": cache}
    a, b = (m.eval().generate(**inputs, **options) for m in models)
    assert torch.equal(a, b)
    other = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 33)
    target = torch.randint(5, 60, (3, 7))
    logits = [
        models[1](input_ids=ids, attention_mask=inputs["attention_mask"], decoder_input_ids=target).logits
        for ids in (inputs["input_ids"], other)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("way", ["assistant", "lookup"])
def test_drafts_are_verified_alike(way: str) -> None:
    ids = padded("none")["input_ids"][:1]
    found = []
    for implementation in ("sdpa", "anymask"):
        draft = {"assistant_model": _decoder("llama")} if way == "assistant" else {"prompt_lookup_num_tokens": 3}
        model = _decoder("mistral", implementation)
        found.append(model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, **draft))
    assert torch.equal(*found)


@pytest.fixture
def in_the_place_of_sdpa() -> Iterator[None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    integration.register("sdpa")
    yield
    transformers.AttentionInterface.register("sdpa", sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("sdpa", sdpa_mask)


@pytest.mark.usefixtures("in_the_place_of_sdpa")
def test_in_the_place_of_sdpa(calls: list[int]) -> None:
    """For what takes no other names, as continuous batching does."""
    inputs = padded("left")
    keep = inputs["attention_mask"].bool()
    found = [_decoder("mistral", name)(**inputs).logits[keep] for name in ("eager", "sdpa")]
    assert calls == [20, 20]
    torch.testing.assert_close(*found, atol=2e-5, rtol=2e-5)
