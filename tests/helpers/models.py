"""Models of Hugging Face transformers, small, from configurations, in twos: by sdpa and by anymask."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
ENCODER = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2}

# name -> configuration and class; each kind of mask and of attention layer that models have
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "mixtral": {"num_local_experts": 2, "sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": None, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {"attention_dropout": 0.0, "hidden_dropout": 0.0},
    "opt": {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32},
    "phi3": {"sliding_window": 9},
    "cohere2": {"sliding_window": 8},
    "deepseek_v3": {
        "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4,
        "moe_intermediate_size": 16, "num_key_value_heads": 4,
    },
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 9},
    "glm4": {},
    "exaone4": {"sliding_window": 8},
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "attention_dropout": 0.0, "dropout": 0.0},
    "electra": {},
    "albert": {"embedding_size": 16},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 3, "sep_token_id": 4},
    "eurobert": {},
    "nomic_bert": {},
}


T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "dropout_rate": 0.0,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
    "use_shared_relative_position_bias": True,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "sliding_window": 7, "num_experts_per_tok": 1}
# a softcap that bends scores of this size
CAPPED = {"attn_logit_softcapping": 0.5, "sliding_window": 8}
# class -> its configuration, what takes part of its scores by name of the weight, and what it returns
SCORED: dict[str, tuple[dict[str, Any], str, Callable[[Any], Tensor] | None]] = {
    "Gemma2ForCausalLM": ({**SMALL, **CAPPED}, "", None),
    "GptOssForCausalLM": ({**SMALL, **EXPERTS}, "sinks", None),
    "T5ForConditionalGeneration": (T5, "relative_attention_bias", lambda o: o.logits),
    "T5EncoderModel": (T5, "relative_attention_bias", None),
    "UMT5ForConditionalGeneration": (T5, "relative_attention_bias", lambda o: o.logits),
    "BeitModel": (VISION, "relative_position_bias_table", lambda o: o.last_hidden_state),
}


def twins(auto: Any, config: Any, device: str = "cpu", beside: str = "sdpa") -> list[torch.nn.Module]:
    """The same model by sdpa, or by what is beside it, and by anymask."""
    made = []
    for name in ("eager" if config.model_type == "gemma2" else beside, "anymask"):
        torch.manual_seed(0)
        # a configuration is changed by the model that is made of it
        make = auto.from_config if hasattr(auto, "from_config") else auto._from_config
        made.append(make(copy.deepcopy(config), attn_implementation=name).to(device))
    for a, b in zip(made[0].state_dict().values(), made[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    return made


def padded(side: str, length: int = 20, device: str = "cpu") -> dict[str, Tensor]:
    """Three rows of tokens, of which two are short."""
    torch.manual_seed(1)
    ids = torch.randint(5, 64, (3, length))
    keep = torch.ones_like(ids)
    for row, short in ((1, 5), (2, 9)):
        if side == "right":
            keep[row, -short:] = 0
        elif side == "left":
            keep[row, :short] = 0
    given = {"input_ids": ids} if side == "none" else {"input_ids": ids, "attention_mask": keep}
    return {name: t.to(device) for name, t in given.items()}


def of_tokens(inputs: dict[str, Tensor]) -> Callable[[Any], Tensor]:
    """Logits, or hidden states, of tokens that are no padding."""
    keep = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return lambda output: (output.logits if "logits" in output else output.last_hidden_state)[keep]


def assert_twins_agree(
    models: list[torch.nn.Module], inputs: dict[str, Tensor], train: bool, pick: Callable[[Any], Tensor] | None = None
) -> None:
    """What `pick` takes of the output, and gradients of a loss over it."""
    found = []
    for model in models:
        model.train(train)
        values = (pick or of_tokens(inputs))(model(**inputs))
        # squares of what a norm gave have next to no gradient
        values.float().sin().mean().backward()
        found.append((values.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (a, a_grads), (b, b_grads) = found
    torch.testing.assert_close(b, a, atol=2e-5, rtol=2e-5)
    assert a_grads.keys() == b_grads.keys()
    largest = max(float(g.abs().max()) for g in a_grads.values())
    for name, grad in a_grads.items():
        torch.testing.assert_close(b_grads[name], grad, atol=2e-5 * max(1.0, largest), rtol=1e-3, msg=name)
