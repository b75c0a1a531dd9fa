"""Calls that must raise, by what is wrong with them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anymask import attention, causal, explain, flash_attention_custom_mask, pack
from anymask.testing import make_qkv


def qkv(**changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    sizes = {"batch": 2, "q_heads": 4, "kv_heads": 2, "q_len": 10, "kv_len": 20, "head_dim": 8, "v_dim": 6} | changes
    return make_qkv(**sizes)


Q, K, V = qkv()
TRUE = torch.ones(10, 20, dtype=torch.bool)
SHORT, THREE_HEADS = pack(TRUE[:, :19]), pack(torch.rand(3, 10, 20) < 0.5)
ELSEWHERE = pack(TRUE).to("meta")

# what: (call, error, part of the message: the argument, what came, what is allowed)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "q of 3 dimensions": (
        lambda: attention(Q[0], K, V),
        ValueError,
        "q has shape (4, 10, 8), 3 dimensions; allowed are 4",
    ),
    "k of 5 dimensions": (lambda: attention(Q, K[None], V), ValueError, "k has shape (1, 2, 2, 20, 8), 5 dimensions"),
    "v of 2 dimensions": (lambda: attention(Q, K, V[0, 0]), ValueError, "v has shape (20, 6), 2 dimensions"),
    "q is a list": (lambda: attention([1.0], K, V), TypeError, "q is a list; allowed is a torch.Tensor"),
    "v is None": (lambda: attention(Q, K, None), TypeError, "v is a NoneType; allowed is a torch.Tensor"),
    "integer q": (lambda: attention(Q.int(), K, V), ValueError, "q has dtype torch.int32; allowed are torch.float16"),
    "complex k": (lambda: attention(Q, K.cfloat(), V), ValueError, "k has dtype torch.complex64; allowed are"),
    "bool v": (lambda: attention(Q, K, V > 0), ValueError, "v has dtype torch.bool; allowed are"),
    "dtypes differ": (
        lambda: attention(Q, K.half(), V),
        ValueError,
        "k has dtype torch.float16 but q has torch.float32",
    ),
    "v's dtype differs": (lambda: attention(Q, K, V.double()), ValueError, "v has dtype torch.float64 but q has"),
    "devices differ": (
        lambda: attention(Q, K.to("meta"), V),
        ValueError,
        "k is on meta but q is on cpu; allowed is one",
    ),
    "v elsewhere": (lambda: attention(Q, K, V.to("meta")), ValueError, "v is on meta but q is on cpu"),
    "batches differ": (lambda: attention(Q, K[:1], V), ValueError, "k.batch is 1 but q.batch is 2; allowed are equal"),
    "v's batch differs": (lambda: attention(Q, K, V[:1]), ValueError, "v.batch is 1 but q.batch is 2"),
    "v's heads differ": (
        lambda: attention(Q, K, V[:, :1]),
        ValueError,
        "v.heads is 1 but k.heads is 2; allowed are equal",
    ),
    "v's length differs": (lambda: attention(Q, K, V[:, :, 1:]), ValueError, "v.length is 19 but k.length is 20"),
    "head_dims differ": (lambda: attention(Q, K[..., :4], V), ValueError, "k.head_dim is 4 but q.head_dim is 8"),
    "head_dim 0": (
        lambda: attention(Q[..., :0], K[..., :0], V),
        ValueError,
        "q.head_dim is 0; allowed are equal sizes from 1",
    ),
    "heads do not divide": (
        lambda: attention(Q[:, :3], K, V),
        ValueError,
        "q has 3 heads and k has 2; allowed is a number of q heads that is a",
    ),
    "no kv heads": (lambda: attention(Q, K[:, :0], V[:, :0]), ValueError, "q has 4 heads and k has 0"),
    "mask too short": (
        lambda: attention(Q, K, V, TRUE[:, :15]),
        ValueError,
        "its dimension -1 is 15 but kv_len is 20; allowed are 1 and 20",
    ),
    "mask with too few rows": (
        lambda: attention(Q, K, V, TRUE[:9]),
        ValueError,
        "its dimension -2 is 9 but q_len is 10",
    ),
    "mask transposed": (lambda: attention(Q, K, V, TRUE.mT), ValueError, "dimension -2 is 20 but q_len is 10"),
    "mask longer than k": (
        lambda: attention(Q, K, V, torch.ones(2, 1, 10, 21, dtype=torch.bool)),
        ValueError,
        "dimension -1 is 21 but kv_len is 20",
    ),
    "mask of 3 samples": (
        lambda: attention(Q, K, V, TRUE.expand(3, 1, 10, 20).clone()),
        ValueError,
        "mask has 3 along batch but q has 2; allowed are 1 and 2",
    ),
    "mask of kv heads": (
        lambda: attention(Q, K, V, TRUE.expand(2, 2, 10, 20).clone()),
        ValueError,
        "mask has 2 along q_heads but q has 4; allowed are 1 and 4",
    ),
    "mask of 1 dimension": (
        lambda: attention(Q, K, V, TRUE[0]),
        ValueError,
        "mask has shape (20,), 1 dimensions; allowed are 2",
    ),
    "mask of 5 dimensions": (
        lambda: attention(Q, K, V, TRUE[None, None, None]),
        ValueError,
        "5 dimensions; allowed are 2 to 4",
    ),
    "float mask": (
        lambda: attention(Q, K, V, TRUE.float()),
        ValueError,
        "mask has dtype torch.float32; allowed is torch.bool",
    ),
    "half mask": (
        lambda: attention(Q, K, V, TRUE.half()),
        ValueError,
        "mask has dtype torch.float16; allowed is torch.bool",
    ),
    "complex mask": (
        lambda: attention(Q, K, V, TRUE.cfloat()),
        ValueError,
        "mask has dtype torch.complex64; allowed is",
    ),
    "uint8 mask": (
        lambda: attention(Q, K, V, TRUE.byte()),
        ValueError,
        "mask has dtype torch.uint8; allowed is torch.bool",
    ),
    "mask is a string": (
        lambda: attention(Q, K, V, "causal"),
        TypeError,
        "mask is a str; allowed are None, a bool tensor",
    ),
    "mask is a function": (lambda: attention(Q, K, V, causal), TypeError, "mask is a function; allowed are None"),
    "mask elsewhere": (lambda: attention(Q, K, V, TRUE.to("meta")), ValueError, "mask is on meta but q is on cpu"),
    "BlockMask elsewhere": (
        lambda: attention(Q, K, V, ELSEWHERE),
        ValueError,
        "mask is on meta but q is on cpu; allowed is the device",
    ),
    "BlockMask of other lengths": (
        lambda: attention(Q, K, V, SHORT),
        ValueError,
        "mask was packed for q_len=10, kv_len=19 but q and k have 10 and 20",
    ),
    "BlockMask of other heads": (
        lambda: attention(Q, K, V, THREE_HEADS),
        ValueError,
        "mask has 3 along q_heads but q has 4",
    ),
    "mask and is_causal": (
        lambda: attention(Q, K, V, TRUE, is_causal=True),
        ValueError,
        "is_causal is True and mask is given; allowed is one",
    ),
    "scale NaN": (lambda: attention(Q, K, V, scale=math.nan), ValueError, "scale is nan; allowed are finite numbers"),
    "scale infinite": (lambda: attention(Q, K, V, scale=-math.inf), ValueError, "scale is -inf; allowed are finite"),
    "scale is a string": (
        lambda: attention(Q, K, V, scale="1"),
        TypeError,
        "scale is a str; allowed are None",
    ),
    "scale is a bool": (
        lambda: attention(Q, K, V, scale=True),
        TypeError,
        "scale is a bool; allowed are None",
    ),
    "scale is a tensor": (
        lambda: attention(Q, K, V, scale=torch.tensor(1.0)),
        TypeError,
        "scale is a Tensor; allowed are None",
    ),
    "is_causal is an int": (
        lambda: attention(Q, K, V, is_causal=1),
        TypeError,
        "is_causal is 1 of type int; allowed is a bool",
    ),
    "return_lse is a string": (
        lambda: attention(Q, K, V, return_lse="yes"),
        TypeError,
        "return_lse is 'yes' of type str",
    ),
    "deterministic is an int": (
        lambda: attention(Q, K, V, deterministic=1),
        TypeError,
        "deterministic is 1; allowed are None",
    ),
    "unknown backend": (
        lambda: attention(Q, K, V, backend="cuda"),
        ValueError,
        "backend is 'cuda'; allowed are None and 'hopper'",
    ),
    "sm_scale NaN": (
        lambda: flash_attention_custom_mask(Q, K, V, None, math.nan),
        ValueError,
        "sm_scale is nan; allowed are",
    ),
    "custom mask is a list": (
        lambda: flash_attention_custom_mask(Q, K, V, [1]),
        TypeError,
        "mask is a list; allowed is",
    ),
    "custom mask of other length": (
        lambda: flash_attention_custom_mask(Q, K, V, TRUE[:, :7].int()),
        ValueError,
        "dimension -1 is 7 but kv_len is 20",
    ),
    "custom mask of other batch": (
        lambda: flash_attention_custom_mask(Q, K, V, torch.ones(3, 1, 10, 20)),
        ValueError,
        "mask has 3 along batch but q has 2",
    ),
    "custom mask with minus infinity": (
        lambda: flash_attention_custom_mask(Q, K, V, TRUE.float().log().masked_fill(TRUE, -math.inf)),
        ValueError,
        "mask is a float tensor that holds -inf, NaN or values up to -10000, as additive masks do; allowed are masks",
    ),
    "custom mask of the least number": (
        lambda: flash_attention_custom_mask(Q, K, V, torch.full((10, 20), torch.finfo(torch.float16).min)),
        ValueError,
        "mask is a float tensor that holds -inf",
    ),
    "custom mask with NaN": (
        lambda: flash_attention_custom_mask(Q, K, V, torch.full((10, 20), math.nan, dtype=torch.bfloat16)),
        ValueError,
        "mask is a float tensor that holds -inf",
    ),
    "expanded mask of 3 samples": (
        lambda: attention(Q, K, V, TRUE.expand(3, 1, 10, 20)),
        ValueError,
        "mask has 3 along batch but q has 2; allowed are 1 and 2",
    ),
    "expanded mask of 3 heads": (
        lambda: attention(Q, K, V, TRUE.expand(3, 10, 20)),
        ValueError,
        "mask has 3 along q_heads but q has 4; allowed are 1 and 4",
    ),
    "expanded custom mask of 3 samples": (
        lambda: flash_attention_custom_mask(Q, K, V, TRUE.int().expand(3, 1, 10, 20)),
        ValueError,
        "mask has 3 along batch but q has 2",
    ),
    "scale beyond floats": (
        lambda: attention(Q, K, V, scale=10**400),
        ValueError,
        "scale is an int of 1329 bits; allowed are finite numbers",
    ),
}

# these, which Dynamo reads before the call does
BAD_EAGER: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "sparse q": (
        lambda: attention(Q.to_sparse(), K, V),
        ValueError,
        "q has layout torch.sparse_coo; allowed is torch.strided: pass q.to_dense()",
    ),
    "sparse mask": (
        lambda: attention(Q, K, V, TRUE.to_sparse()),
        ValueError,
        "mask has layout torch.sparse_coo; allowed is torch.strided",
    ),
    "mask in rows": (
        lambda: attention(Q, K, V, TRUE.to_sparse_csr()),
        ValueError,
        "mask has layout torch.sparse_csr; allowed is torch.strided",
    ),
    "nested k": (
        lambda: attention(Q, torch.nested.nested_tensor([torch.randn(2, 5, 8)]), V),
        ValueError,
        "k is a nested tensor; allowed are dense ones: sequences in one row under mask=document(...), or padded",
    ),
    "jagged v": (
        lambda: attention(Q, K, torch.nested.nested_tensor([torch.randn(5, 2, 8)], layout=torch.jagged)),
        ValueError,
        "v is a nested tensor; allowed are dense ones",
    ),
    "nested mask": (
        lambda: attention(Q, K, V, torch.nested.nested_tensor([TRUE])),
        ValueError,
        "mask is a nested tensor; allowed are dense ones",
    ),
    **{
        f"keyword {name} of {call.__name__}": (
            partial(call, Q, K, V, **{name: None}),
            TypeError,
            f"{name} is no argument; {hint}",
        )
        for call in (attention, explain)
        for name, hint in {
            "attn_mask": "write mask=...",
            "block_mask": "write mask=...",
            "causal": "write is_causal=... or mask=causal()",
            "softmax_scale": "write scale=...",
            "window_size": "write mask=sliding_window(...)",
            "enable_gqa": "leave it out: k and v may have fewer heads than q",
            "dropout": "write dropout_p=...",
            "is_casual": (
                "allowed keywords are mask, bias, scale, softcap, sinks, dropout_p, is_causal, return_lse, "
                "deterministic and backend"
            ),
        }.items()
    },
}
