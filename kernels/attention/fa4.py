"""FlashAttention 4 as a PyTorch operator, so that torch.compile sees one call and not Python that it cannot trace.

FA4 is written in CuTe's Python and has no operator of its own (FA3 and FA2 do): traced, it would break a model's graph
in every layer. Its forward and backward are called here, by the names they have in `flash_attn.cute.interface`; a
version that has others fails its probe (backends.py), and the next backend is taken.

Source: github.com/Dao-AILab/flash-attention, flash_attn/cute.
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..triton_utils import operator


def _interface() -> Any:
    return importlib.import_module("flash_attn.cute.interface")


@operator()
def _flash_attention_4(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, left: int | None, right: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D), log-sum-exp (B, H, T) float32); left and right: keys beside the query's own, None for all."""
    if isinstance(q, FakeTensor):
        return torch.empty_like(q), q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32)
    out, lse, *_ = _interface()._flash_attn_fwd(
        q, k, v, softmax_scale=scale, causal=causal, window_size_left=left, window_size_right=right, return_lse=True
    )
    return out, lse


@operator()
def _flash_attention_4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, left: int | None,
    right: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if isinstance(q, FakeTensor):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dq, dk, dv, *_ = _interface()._flash_attn_bwd(
        q, k, v, out, dout, lse, scale, causal, window_size_left=left, window_size_right=right
    )
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dout: Tensor, _: Any) -> tuple[Any, ...]:
    return *_flash_attention_4_backward(dout.contiguous(), *ctx.saved_tensors, *ctx.settings), None, None, None, None


_flash_attention_4.register_autograd(_gradients, setup_context=_save)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: tuple[int | None, int | None]
) -> Tensor:
    """As the package's own. Raises ModuleNotFoundError where it is not installed."""
    return _flash_attention_4(*(x.contiguous() for x in (q, k, v)), causal, *window_size, softmax_scale)[0]
