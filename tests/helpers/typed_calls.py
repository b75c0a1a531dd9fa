"""Calls whose types mypy checks in `make lint`; nobody runs them. An ignore that nothing needs is an error there."""

from torch import Tensor
from typing_extensions import assert_type

from anymask import attention, causal, pack
from fa2_custom_mask import flash_attention_custom_mask


def typed_calls(q: Tensor, k: Tensor, v: Tensor, flag: bool) -> None:
    assert_type(attention(q, k, v, causal()), Tensor)
    assert_type(attention(q, k, v, pack(q > 0), return_lse=True), tuple[Tensor, Tensor])
    assert_type(attention(q, k, v, q > 0, return_lse=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(attention(q, k, v, backend="triton"), Tensor)
    attention(q, k, v, backend="hoper")  # type: ignore[call-overload]
    assert_type(flash_attention_custom_mask(q, k, v, q > 0), Tensor)
