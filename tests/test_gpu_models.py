"""Models of Hugging Face transformers on a GPU: trained, checkpointed, compiled, and generating, beside sdpa."""

from typing import Any

import pytest
import torch

from anymask.integrations import transformers as integration
from tests.helpers.models import DECODERS, ENCODER, SCORED, SMALL, assert_twins_agree, padded, twins

transformers = pytest.importorskip("transformers", minversion="5.0")
integration.register()

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
# a head that the kernels of Hopper take too
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


def decoders(name: str, device: str, **changes: Any) -> list[torch.nn.Module]:
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **DECODERS[name], **WIDE, **changes})
    # torch's exact kernel in fp32
    return twins(transformers.AutoModelForCausalLM, config, device, beside="eager")


@pytest.mark.parametrize("side", ["none", "right", "left", "packed"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_training(name: str, side: str, device: str) -> None:
    inputs = padded("none" if side == "packed" else side, 300, device)
    if side == "packed":
        inputs |= {"position_ids": (torch.arange(300, device=device) % 130).expand(3, -1), "use_cache": False}
    assert_twins_agree(decoders(name, device), inputs, train=True)


def test_an_encoder(device: str) -> None:
    config = transformers.AutoConfig.for_model("bert", **{**ENCODER, "hidden_size": 128, "num_attention_heads": 2})
    assert_twins_agree(twins(transformers.AutoModel, config, device, "eager"), padded("right", 300, device), train=True)


@pytest.mark.parametrize("name", SCORED)
def test_models_that_change_scores(name: str, device: str) -> None:
    """Softcap, sinks, and a position bias with its gradient, beside eager."""
    made = getattr(transformers, name)
    changes, _, pick = SCORED[name]
    models = twins(made, made.config_class(**changes), device, "eager")
    inputs = padded("right", 300, device)
    if name == "BeitModel":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, device=device)}
    elif "Conditional" in name:
        inputs |= {"decoder_input_ids": inputs["input_ids"][:, :150]}
    assert_twins_agree(models, inputs, True, pick)


def test_dropout(device: str) -> None:
    config = transformers.BertConfig(**{**ENCODER, "attention_probs_dropout_prob": 0.4})
    model = transformers.BertModel._from_config(config, attn_implementation="anymask").to(device).train()
    inputs, found = padded("right", 300, device), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        found.append(model(**inputs).last_hidden_state)
    assert torch.equal(*found)
    assert not torch.equal(model(**inputs).last_hidden_state, found[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_near_to_fp32_as_sdpa(dtype: torch.dtype, device: str) -> None:
    config = transformers.AutoConfig.for_model("llama", **{**SMALL, **WIDE})
    models = twins(transformers.AutoModelForCausalLM, config, device)
    inputs, found = padded("right", 300, device), []
    keep = inputs["attention_mask"].bool()
    for model, kind in ((models[0], torch.float32), (models[0], dtype), (models[1], dtype)):
        logits = model.to(kind)(**inputs).logits[keep].float()
        logits.sin().mean().backward()
        weight = model.model.layers[0].self_attn.v_proj.weight
        found.append((logits.detach(), weight.grad.float()))
        model.zero_grad()
    # weights that have been rounded are no longer those of fp32, but those of both are the same
    for exact, usual, ours in zip(*found, strict=True):
        assert (ours - exact).norm() <= 2 * (usual - exact).norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_change_nothing(reentrant: bool, device: str) -> None:
    _, model = decoders("llama", device, use_cache=False)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train().zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = model(**padded("right", 300, device)).logits.float().sin().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for again, once in zip(found[1], found[0], strict=True):
        # dq of the Hopper kernels differs in its last bits from run to run
        assert (again - once).norm() <= 1e-2 * once.norm()


@pytest.mark.compile
@pytest.mark.parametrize(("name", "checkpointed"), [("llama", False), ("llama", True), ("gemma3_text", False)])
def test_compiled(name: str, checkpointed: bool, device: str) -> None:
    models = decoders(name, device, use_cache=False)
    if checkpointed:
        for model in models:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    models[1].compile(fullgraph=True)
    assert_twins_agree(models, padded("right", 300, device), train=True)


@pytest.mark.compile
@pytest.mark.parametrize("mode", ["reduce-overhead", "default", None])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_generation_with_a_static_cache(name: str, mode: str | None, device: str) -> None:
    """`mode` None is not compiled; the first is what `generate` asks for by itself, with a CUDA graph."""
    models = [m.eval() for m in decoders(name, device)]
    options: dict[str, Any] = {"cache_implementation": "static", "max_new_tokens": 12, "do_sample": False}
    inputs = padded("left", 124, device)
    expected = models[0].generate(**inputs, **options, disable_compile=True)
    options |= {"disable_compile": True} if mode is None else {
        "compile_config": transformers.CompileConfig(mode=mode, fullgraph=True)
    }  # fmt: skip
    for _ in range(2):
        # again, with what is compiled
        assert torch.equal(models[1].generate(**inputs, **options), expected)
