"""Models of Hugging Face transformers under `attn_implementation="anymask"`, beside sdpa."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anymask import BlockMask, causal, pack
from anymask.integrations import transformers as integration
from tests.helpers.models import DECODERS, ENCODER, ENCODERS, SMALL, assert_twins_agree, padded, twins

transformers = pytest.importorskip("transformers", minversion="5.0")
masking = pytest.importorskip("transformers.masking_utils")
integration.register()

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str, side: str) -> None:
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **DECODERS[name]})
    assert_twins_agree(twins(transformers.AutoModelForCausalLM, config), padded(side), train=side == "right")


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str, side: str) -> None:
    config = transformers.AutoConfig.for_model(name, **{**ENCODER, **ENCODERS[name]})
    assert_twins_agree(twins(transformers.AutoModel, config), padded(side), train=side == "right")


SEQ2SEQ = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 32, "attention_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LANGUAGE = {**TEXT, "model_type": "llama", "num_key_value_heads": 2, "head_dim": 8}
GEMMA3 = {
    **LANGUAGE, "model_type": "gemma3_text", "num_hidden_layers": 2, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8, "attention_dropout": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
}  # fmt: skip
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "projection_dim": 32}
IMAGE = 63
WAV2VEC2 = {
    **TEXT, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip
# class -> its configuration, its inputs by the names below, and what of its output no padding reaches
MODELS: dict[str, tuple[dict[str, Any], str, Callable[[Any], Tensor]]] = {
    **{
        f"{name}ForConditionalGeneration": (SEQ2SEQ, "text target", lambda o: o.logits[:, :5])
        for name in ("Bart", "MBart", "Pegasus", "M2M100", "Blenderbot")
    },
    "MarianMTModel": (SEQ2SEQ, "text target", lambda o: o.logits[:, :5]),
    "WhisperForConditionalGeneration": (
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32},
        "sound target",
        lambda o: o.logits[:, :5],
    ),
    **{
        f"{name}Model": (VISION, "image", lambda o: o.last_hidden_state)
        for name in ("ViT", "DeiT", "Dinov2", "SiglipVision", "CLIPVision", "Beit")
    },
    "CLIPModel": ({"text_config": TEXT, "vision_config": VISION}, "text image", lambda o: o.logits_per_text),
    "SiglipModel": ({"text_config": TEXT, "vision_config": VISION}, "text image", lambda o: o.logits_per_text),
    "LlavaForConditionalGeneration": (
        {"text_config": LANGUAGE, "vision_config": CLIP, "image_token_index": IMAGE, "vision_feature_layer": -1},
        "text image",
        lambda o: o.logits[:, :8],
    ),
    "PaliGemmaForConditionalGeneration": (
        {
            "text_config": {**LANGUAGE, "model_type": "gemma"}, "vision_config": SIGLIP, "image_token_index": IMAGE,
            "projection_dim": 32, "hidden_size": 32,
        },
        "text image suffix",
        lambda o: o.logits[:, :8],
    ),
    "Gemma3ForConditionalGeneration": (
        {"text_config": GEMMA3, "vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_id": IMAGE},
        "text image kinds",
        lambda o: o.logits[:, :8],
    ),
    "Wav2Vec2Model": (WAV2VEC2, "wave", lambda o: o.last_hidden_state[:, :10]),
}  # fmt: skip


def inputs_of(kinds: str) -> dict[str, Tensor]:
    """Two samples, the second padded on the right: a text with an image in it, its translation, a sound, an image."""
    torch.manual_seed(1)
    ids, target = torch.randint(5, 60, (2, 12)), torch.randint(5, 60, (2, 7))
    ids[:, 1:5] = IMAGE
    kept, target_kept, wave_kept = (torch.arange(n) < torch.tensor([[n], [n - n // 3]]) for n in (12, 7, 400))
    found: dict[str, dict[str, Tensor]] = {
        "text": {"input_ids": ids, "attention_mask": kept.long()},
        "target": {"decoder_input_ids": target, "decoder_attention_mask": target_kept.long()},
        "sound": {"input_features": torch.randn(2, 8, 20)},
        "wave": {"input_values": torch.randn(2, 400), "attention_mask": wave_kept.long()},
        "image": {"pixel_values": torch.randn(2, 3, 16, 16)},
        "suffix": {"token_type_ids": (torch.arange(12) > 6).long().expand(2, 12)},
        "kinds": {"token_type_ids": (ids == IMAGE).long()},
    }  # fmt: skip
    return {name: t for kind in kinds.split() for name, t in found[kind].items()}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_text_sound_and_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, kinds, pick = MODELS[name]
    model = getattr(transformers, name)
    models = twins(model, model.config_class(**changes))
    calls = []
    attention = integration.attention
    monkeypatch.setattr(integration, "attention", lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs))
    assert_twins_agree(models, inputs_of(kinds), True, pick)
    assert calls


VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
# older ones have no such function
REMAPPED = getattr(masking, "remap_positions_for_packed_sequence", lambda fn, positions: fn)
FUNCTIONS: dict[str, Any] = {
    "causal": lambda length: masking.causal_mask_function,
    "bidirectional": lambda length: masking.bidirectional_mask_function,
    "window": lambda length: masking.sliding_window_causal_mask_function(5),
    "window_both": lambda length: masking.sliding_window_bidirectional_mask_function(5),
    "chunked": lambda length: masking.chunked_causal_mask_function(6, torch.tensor([0, 3, 4])),
    "blocks": lambda length: masking.or_masks(
        masking.causal_mask_function, masking.blockwise_overlay((torch.arange(3 * length).view(3, -1) // 4) % 3 - 1)
    ),
    "packed": lambda length: masking.and_masks(
        REMAPPED(masking.sliding_window_causal_mask_function(3), torch.arange(length).expand(3, -1) % 7),
        masking.packed_sequence_mask_function(torch.arange(length).expand(3, -1) // 7),
    ),
    "custom": lambda length: masking.and_masks(masking.causal_mask_function, lambda b, h, q, k: (q + k + b) % 3 > 0),
}
# q_length, kv_length, q_offset, kv_offset: a forward pass, a step, a prefill in parts, a window of a cache
PLANES = [
    (20, 20, 0, 0),
    (1, 20, 19, 0),
    (6, 20, 14, 0),
    (6, 30, 5, 0),
    (1, 8, 19, 12),
    (4, 11, 16, 9),
    (150, 150, 0, 0),
]


@pytest.mark.parametrize("offset", ["int", "tensor"])
@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_are_those_of_sdpa(name: str, side: str, offset: str) -> None:
    for q_len, kv_len, q_offset, kv_offset in PLANES:
        fn = FUNCTIONS[name](200)
        sizes = {
            "batch_size": 3, "q_length": q_len, "kv_length": kv_len, "kv_offset": kv_offset, "mask_function": fn,
            "q_offset": torch.tensor(q_offset) if offset == "tensor" else q_offset,
        }  # fmt: skip
        keep = None if side == "none" else padded(side, q_offset + q_len)["attention_mask"].bool()
        expected = masking.sdpa_mask(
            **sizes, attention_mask=keep, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
        )
        found = integration.mask(**sizes, attention_mask=keep, allow_is_causal_skip=False)
        assert isinstance(found, BlockMask)
        assert torch.equal(found.to_dense().expand_as(expected), expected), (q_len, kv_len, q_offset, kv_offset)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_of_transformers_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(integration._Plane, "evaluated", lambda self, fn: called.append(fn) or integration.EVERYTHING)
    integration.mask(3, 20, 20, mask_function=FUNCTIONS[name](20))
    assert len(called) == (1 if name == "custom" else 0)


def test_a_function_of_scalars_is_called_with_scalars() -> None:
    last = torch.tensor([4, 9, 14])

    def by_scalars(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(k <= last[b], q >= 0, q == k)

    sizes = {"batch_size": 3, "q_length": 20, "kv_length": 20, "mask_function": by_scalars, "use_vmap": True}
    expected = masking.sdpa_mask(**sizes, allow_is_causal_skip=False)
    assert torch.equal(integration.mask(**sizes).to_dense(), expected)


def test_a_causal_mask_is_packed_once() -> None:
    found = integration.mask(1, 5, 9, allow_is_causal_skip=True)
    assert torch.equal(found.to_dense()[0, 0], torch.ones(5, 9, dtype=torch.bool).tril())
    assert integration.mask(3, 5, 9) is found
    assert integration.mask(1, 5, 9, 4) is not found


def test_a_layer_that_does_not_say_it_is_causal() -> None:
    models = _llama()
    for layer in models[1].model.layers:
        layer.self_attn.is_causal = False
    assert_twins_agree(models, padded("none"), True)


def test_none_stands_for_all_pairs_only() -> None:
    assert integration.mask(1, 5, 5) is not None
    every = masking.bidirectional_mask_function
    assert integration.mask(1, 5, 5, mask_function=every) is not None
    assert integration.mask(1, 5, 5, mask_function=every, allow_is_bidirectional_skip=True) is None


def _llama(**changes: Any) -> list[torch.nn.Module]:
    return twins(transformers.AutoModelForCausalLM, transformers.LlamaConfig(**{**SMALL, **changes}))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "llama4_text"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8}, {"use_cache": False}],
    ids=lambda o: "-".join(map(str, o)) or "greedy",
)
def test_generation_gives_the_same_tokens(name: str, options: dict[str, Any]) -> None:
    if name == "llama4_text" and "cache_implementation" in options and VERSION < (5, 24):
        pytest.skip("this transformers gives chunked masks an argument that they do not take")
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **DECODERS[name]})
    models = twins(transformers.AutoModelForCausalLM, config)
    options = {**options, "disable_compile": True, "max_new_tokens": 12, "do_sample": False}
    a, b = (m.eval().generate(**padded("left"), **options) for m in models)
    assert torch.equal(a, b)


def test_masks_are_packed_once_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(integration, "pack", lambda *args, **kwargs: made.append(1) or pack(*args, **kwargs))
    config = transformers.AutoConfig.for_model("gemma3_text", **{**SMALL, **DECODERS["gemma3_text"]})
    config.num_hidden_layers, config.layer_types = 6, ["sliding_attention", "full_attention"] * 3
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="anymask")
    model(**padded("right"))
    assert len(made) == 2


def test_a_layer_adds_one_view_to_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation takes the host several microseconds, in every layer."""
    called = []

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(fn.overloadpacket)
            return fn(*args, **(kwargs or {}))

    q = torch.randn(1, 20, 4, 8).transpose(1, 2)
    monkeypatch.setattr(integration, "attention", lambda *args, **kwargs: q)
    for mask in (None, pack(causal(), q_len=20, kv_len=20)):
        with Called():
            o, _ = integration.attention_forward(torch.nn.Module(), q, q, q, mask, scaling=0.3, dropout=0.0)
        assert o.is_contiguous()
    # contiguous() of what is contiguous does nothing
    assert called == [torch.ops.aten.transpose] * 2


def test_packed_documents_do_not_see_each_other() -> None:
    _, model = _llama()
    first, second = torch.randint(5, 64, (1, 13)), torch.randint(5, 64, (1, 9))
    ids = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(13), torch.arange(9)])[None]
    together = model.eval()(ids, position_ids=positions, use_cache=False).logits
    for part, alone in ((slice(0, 13), first), (slice(13, 22), second)):
        torch.testing.assert_close(together[:, part], model(alone).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["bool", "float", "minimum", "BlockMask"])
def test_a_mask_of_the_user_is_honoured(form: str) -> None:
    sdpa, ours = (m.eval() for m in _llama())
    ids = padded("none")["input_ids"]
    seen = (torch.rand(3, 1, 20, 20) < 0.5) | torch.eye(20, dtype=torch.bool)
    expected = sdpa(ids, attention_mask=seen).logits
    lowest = -torch.inf if form == "float" else torch.finfo(torch.float32).min
    mask = {"bool": seen, "BlockMask": pack(seen)}.get(form, torch.zeros(3, 1, 20, 20).masked_fill(~seen, lowest))
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    models = _llama()
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_twins_agree(models, padded("right"), train=True)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "side"), [("llama", "right"), ("mistral", "left"), ("llama", "none"), ("llama", "packed")]
)
def test_compiled(name: str, side: str) -> None:
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **DECODERS[name], "num_hidden_layers": 1})
    models = twins(transformers.AutoModelForCausalLM, config)
    models[1].compile(backend="aot_eager", fullgraph=True)
    inputs = padded("none" if side == "packed" else side)
    if side == "packed":
        inputs |= {"position_ids": (torch.arange(20) % 13).expand(3, -1), "use_cache": False}
    assert_twins_agree(models, inputs, train=True)


@pytest.mark.compile
def test_compiled_with_checkpoints() -> None:
    models = _llama(num_hidden_layers=1, use_cache=False)
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    models[1].compile(backend="aot_eager", fullgraph=True)
    assert_twins_agree(models, padded("right"), train=True)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_compiled_generation_crosses_a_tile(name: str) -> None:
    """A static cache, whose masks have more full tiles after token 128, and a step that is compiled once."""
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **DECODERS[name]})
    models = [m.eval() for m in twins(transformers.AutoModelForCausalLM, config)]
    options = {"cache_implementation": "static", "max_new_tokens": 9, "do_sample": False}
    expected = models[0].generate(**padded("left", 124), **options, disable_compile=True)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compilation = transformers.CompileConfig(backend=backend, fullgraph=True, mode=None)
    # without a GPU too
    compilation._compile_all_devices = True
    found = models[1].generate(**padded("left", 124), **options, compile_config=compilation)
    assert torch.equal(found, expected)
    # once for the sizes of the first step, and once for all sizes
    assert 1 <= len(graphs) <= 3


@pytest.mark.compile
@pytest.mark.parametrize("name", ["causal", "packed", "blocks", "scalars"])
def test_masks_inside_a_compiled_function(name: str) -> None:
    """Closures made in the graph cannot be read there."""
    last = torch.tensor([4, 9, 14])

    def by_scalars(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # of one pair, or else of all
        return torch.where(k <= last[b], q >= 0, q == k).any()

    def made(q_offset: int) -> dict[str, Any]:
        fn = by_scalars if name == "scalars" else FUNCTIONS[name](20)
        return {
            "batch_size": 3, "q_length": 8, "kv_length": 11, "q_offset": q_offset, "kv_offset": 9, "mask_function": fn,
            "use_vmap": name == "scalars", "allow_is_causal_skip": False,
        }  # fmt: skip

    def packed(keep: Tensor, q_offset: int) -> Tensor:
        return integration.mask(**made(q_offset), attention_mask=keep).to_dense()

    keep = padded("right")["attention_mask"].bool()
    expected = masking.sdpa_mask(**made(12), attention_mask=keep)
    found = torch.compile(packed, backend="eager")(keep, 12)
    assert torch.equal(found.expand_as(expected), expected)


def test_without_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5'"):
        integration.register()
