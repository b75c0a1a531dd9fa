"""Models of transformers that do more to their scores than mask them: softcap, sinks, position bias, dropout."""

import copy

import pytest
import torch
from torch import Tensor, nn

from anymask import causal, pack
from anymask.integrations import transformers as integration
from tests.helpers.models import CAPPED, ENCODER, SCORED, SMALL, assert_twins_agree, padded, twins

transformers = pytest.importorskip("transformers", minversion="5.0")
integration.register()

pytestmark = pytest.mark.filterwarnings("ignore")


def inputs_of(name: str, side: str) -> dict[str, Tensor]:
    if name == "BeitModel":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    given = padded(side)
    return given | {"decoder_input_ids": torch.randint(5, 64, (3, 7))} if "Conditional" in name else given


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("name", SCORED)
def test_models_agree_with_eager(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, weight, pick = SCORED[name]
    made = getattr(transformers, name)
    models = twins(made, made.config_class(**changes), beside="eager")
    for model in models:
        torch.manual_seed(2)
        for named, parameter in model.named_parameters():
            if weight and weight in named:
                # some begin with zeros
                nn.init.normal_(parameter)
    asked = []
    honest = integration.attention
    monkeypatch.setattr(integration, "attention", lambda *a, **scores: asked.append(scores) or honest(*a, **scores))
    assert_twins_agree(models, inputs_of(name, side), True, pick)
    assert any(scores["bias"] is not None or scores["softcap"] or scores["sinks"] is not None for scores in asked)
    if weight:
        grads = [p.grad for named, p in models[1].named_parameters() if weight in named]
        assert grads
        assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "GptOssForCausalLM", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_they_generate_the_same_tokens(cache: str, name: str) -> None:
    made = getattr(transformers, name)
    models = twins(made, made.config_class(**SCORED[name][0]), beside="eager")
    options = {"cache_implementation": cache, "disable_compile": True, "max_new_tokens": 9, "do_sample": False}
    a, b = (m.eval().generate(**padded("left"), **options) for m in models)
    assert torch.equal(a, b)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "T5EncoderModel"])
def test_they_are_compiled_whole(name: str) -> None:
    made = getattr(transformers, name)
    models = twins(
        made, made.config_class(**{**SCORED[name][0], "num_hidden_layers": 1, "num_layers": 1}), beside="eager"
    )
    models[1].compile(backend="aot_eager", fullgraph=True)
    assert_twins_agree(models, padded("right"), True)


def test_a_bias_of_the_user_is_added() -> None:
    models = twins(transformers.AutoModelForCausalLM, transformers.LlamaConfig(**SMALL), beside="eager")
    inputs = padded("none") | {"attention_mask": torch.randn(3, 1, 20, 20)}
    assert_twins_agree(models, inputs, False, lambda o: o.logits)


def _bert(p: float) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**ENCODER, "num_hidden_layers": 1, "attention_probs_dropout_prob": p})
    return transformers.BertModel._from_config(config, attn_implementation="anymask").train()


def test_dropout_is_none_in_evaluation_and_at_0() -> None:
    inputs, without = padded("right"), _bert(0.0)
    expected = without(**inputs).last_hidden_state
    assert torch.equal(_bert(0.4).eval()(**inputs).last_hidden_state, expected)
    assert not torch.equal(_bert(0.4)(**inputs).last_hidden_state, expected)


def test_dropout_has_its_expectation() -> None:
    """Of the attention alone, which is linear in the weights that are dropped, beside eager's."""
    model = _bert(0.3)
    layer = model.encoder.layer[0].attention.self
    x = torch.randn(2, 20, 32)
    mask = pack(causal(), q_len=20, kv_len=20)

    def mean(times: int) -> Tensor:
        return torch.stack([layer(x, attention_mask=mask)[0] for _ in range(times)]).mean(0)

    with torch.no_grad():
        drawn = mean(400)
        expected = layer.eval()(x, attention_mask=mask)[0]
    # a weight has a standard deviation of sqrt(3 / 7) of itself in a draw
    assert (drawn - expected).norm() < 0.1 * expected.norm()
    assert (drawn - expected).norm() > 1e-4 * expected.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_drops_the_same_where_it_is_computed_again(reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model = _bert(0.4)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        o = model(**padded("right")).last_hidden_state
        o.sin().sum().backward()
        found.append([o.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_softcap_beside_a_bias_is_refused() -> None:
    config = transformers.AutoConfig.for_model("gemma2", **{**SMALL, **CAPPED})
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="anymask")
    with pytest.raises(ValueError, match="Gemma2Attention has a softcap and a bias; allowed is one of them"):
        model(padded("none")["input_ids"], attention_mask=torch.randn(3, 1, 20, 20))
    seen = torch.zeros(3, 1, 20, 20).masked_fill(torch.rand(3, 1, 20, 20) < 0.3, -torch.inf)
    # a mask is no bias
    assert model(padded("none")["input_ids"], attention_mask=seen).logits.isfinite().all()


def test_weights_are_refused() -> None:
    config = transformers.BertConfig(**ENCODER)
    model = transformers.BertModel._from_config(config, attn_implementation="anymask")
    with pytest.raises(ValueError, match="BertSelfAttention asks for output_attentions"):
        integration.attention_forward(
            model.encoder.layer[0].attention.self, *(torch.randn(1, 2, 5, 8),) * 3, None, output_attentions=True
        )
