"""The MLP with a squared ReLU in fp8: relu(x·W₁ᵀ)²·W₂ᵀ, forward and backward six products.

relu² and its gradient are not passes: they are done where their results are rounded (quantize.py), so relu(h)² exists
in fp8 only, and dh as well. Saved are h in x's dtype and the fp8 transposes of x, W₁, W₂ and relu(h)². Per layer and
step that leaves, besides the products' own, reads of h, h and dy and writes of 1 + 1 bytes for relu² and for dh; with
separate passes of maximum, activation, rounding and transposing it is more than three times that.

When it does not pay: as fp8_linear.

Source: as quantize.py and linear_relu2.py.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..linear_relu2 import _pair_inputs
from ..registry import Op, as_rows, check_device, itemsize, register, without_autocast
from .linear import CASES, check_history, probe, runs
from .quantize import E4M3, E5M2, RELU2, RELU2_BACKWARD, Quantized, plain, product, quantize, quantized_input

ROLES = ("x", "w1", "relu2", "w2", "dout", "dh")  # rows of a delayed history


class _Fp8Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w2, values, transposed, inverse, history, fused):
        x8 = quantized_input(x, (values, transposed, inverse), fused, history)
        w1_8 = quantize(w1, E4M3, fused, history=history, row=1)
        h = product(x8.values, w1_8.values, x8.inverse * w1_8.inverse, x.dtype)  # (N, F)
        y8 = quantize(h, E4M3, fused, RELU2, history=history, row=2)
        w2_8 = quantize(w2, E4M3, fused, history=history, row=3)
        ctx.save_for_backward(
            h, x8.transposed, x8.inverse, w1_8.transposed, w1_8.inverse, y8.transposed, y8.inverse, w2_8.transposed,
            w2_8.inverse,
        )  # fmt: skip
        ctx.history, ctx.fused, ctx.dtypes = history, fused, (w1.dtype, w2.dtype)
        return product(y8.values, w2_8.values, y8.inverse * w2_8.inverse, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        h, xt, x_inverse, w1t, w1_inverse, yt, y_inverse, w2t, w2_inverse = ctx.saved_tensors
        dout8 = quantize(dout.contiguous(), E5M2, ctx.fused, history=ctx.history, row=4)
        dy = product(dout8.values, w2t, dout8.inverse * w2_inverse, h.dtype, exact=True)  # (N, F)
        dw2 = product(dout8.transposed, yt, dout8.inverse * y_inverse, ctx.dtypes[1], exact=True)
        dh8 = quantize(dy, E5M2, ctx.fused, RELU2_BACKWARD, h, history=ctx.history, row=5)
        dx = product(dh8.values, w1t, dh8.inverse * w1_inverse, h.dtype, exact=True)
        dw1 = product(dh8.transposed, xt, dh8.inverse * x_inverse, ctx.dtypes[0], exact=True)
        return dx, dw1, dw2, None, None, None, None, None


def fp8_mlp_relu2_reference(x: Tensor | Quantized, w1: Tensor, w2: Tensor, history: Tensor | None = None) -> Tensor:
    return _apply(x, w1, w2, history, fused=False)


def _fp8_mlp_relu2_triton(x: Tensor | Quantized, w1: Tensor, w2: Tensor, history: Tensor | None = None) -> Tensor:
    return _apply(x, w1, w2, history, fused=True)


def _apply(x: Tensor | Quantized, w1: Tensor, w2: Tensor, history: Tensor | None, fused: bool) -> Tensor:
    made = x.fp8 if isinstance(x, Quantized) else (None, None, None)
    x = plain(x)
    with without_autocast(x):
        out = _Fp8Mlp.apply(as_rows(x), w1.contiguous(), w2.contiguous(), *made, history, fused)
    return out.view(*x.shape[:-1], w2.size(0))


def fp8_mlp_relu2(x: Tensor | Quantized, w1: Tensor, w2: Tensor, history: Tensor | None = None) -> Tensor:
    """relu(x·w1ᵀ)²·w2ᵀ with every product in fp8.

    x: (..., C), float32 or bfloat16, or Quantized; w1 (F, C) and w2 (E, F), any floating dtype; history: None for
    current scaling, or (6, HISTORY) float32 for delayed scaling, updated in place. Returns (..., E) in x's dtype.
    Raises ValueError when shapes or dtypes do not fit.
    """
    values = plain(x)
    if w1.ndim != 2 or w2.ndim != 2 or w1.size(1) != values.size(-1) or w2.size(1) != w1.size(0):
        raise ValueError(
            f"fp8_mlp_relu2: w1 is {tuple(w1.shape)}, w2 {tuple(w2.shape)} but x has C={values.size(-1)}, "
            "wanted (F, C) and (E, F)"
        )
    check_device("fp8_mlp_relu2", values, w1=w1, w2=w2)
    check_history("fp8_mlp_relu2", history, len(ROLES))
    return _apply(x, w1, w2, history, runs("fp8_mlp_relu2", values))


register(
    Op(
        name="fp8_mlp_relu2",
        fn=fp8_mlp_relu2,
        reference=fp8_mlp_relu2_reference,
        inputs=_pair_inputs,
        cases=CASES,
        flops=lambda case: 4 * case["N"] * case["C"] * case["F"],
        bytes=lambda case, dtype: itemsize(dtype) * 2 * (case["N"] * case["C"] + case["F"] * case["C"]),
        tolerance={torch.float32: 0.08, torch.bfloat16: 0.08},  # two layers of it
        differentiable=("x", "w1", "w2"),
        triton=_fp8_mlp_relu2_triton,
        size=lambda case: case["C"],
        probe=probe,
    )
)
