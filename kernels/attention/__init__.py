"""Attention: `flash_attention` for training and prefill, `flash_attention_decode` over a KV cache."""

from .decode import flash_attention_decode
from .flash import flash_attention

__all__ = ["flash_attention", "flash_attention_decode"]
