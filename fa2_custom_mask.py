"""The import name of `flashattention2-custom-mask`, for code written for that package."""

from anymask import flash_attention_custom_mask as flash_attention_custom_mask

__all__ = ["flash_attention_custom_mask"]
