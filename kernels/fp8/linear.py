"""A linear layer in 8-bit floating point: e4m3 forward, e5m2 for the incoming gradient.

    y = q(x)·q(w)ᵀ,     dx = q(dy)·q(w),     dw = q(dy)ᵀ·q(x)

Three products of 2·N·C·F FLOPs at twice the rate of bfloat16 on Hopper and newer. What they cost beside the products is
the rounding: quantize.py has the arithmetic of it, and how little of it is left. Saved for backward are only the
transposed fp8 copies of x and w, half of what bfloat16 saves.

When it does not pay: small layers (the rounding is bound by memory, the products are not), cards without fp8 units
(there the reference emulates it, exactly and slowly), and where 3 mantissa bits are too few: nanochat keeps the gates
in bfloat16, and so does gpt.py.

Source: as quantize.py.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import triton_runs
from ..linear_relu2 import _inputs
from ..registry import Case, Op, as_rows, check_device, itemsize, register, without_autocast
from .quantize import E4M3, E5M2, HISTORY, Quantized, plain, product, quantize, quantized_input

ROLES = ("x", "weight", "gradient")  # rows of a delayed history


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, values, transposed, inverse, history, fused):
        """x (N, C); values (N, C), transposed (C, N), inverse (): x in fp8 where its producer made it, else None."""
        x8 = quantized_input(x, (values, transposed, inverse), fused, history)
        w8 = quantize(weight, E4M3, fused, history=history, row=1)
        ctx.save_for_backward(x8.transposed, x8.inverse, w8.transposed, w8.inverse)
        ctx.history, ctx.fused, ctx.dtypes = history, fused, (x.dtype, weight.dtype)
        return product(x8.values, w8.values, x8.inverse * w8.inverse, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        xt, x_inverse, wt, w_inverse = ctx.saved_tensors
        dy8 = quantize(dy.contiguous(), E5M2, ctx.fused, history=ctx.history, row=2)
        dx = product(dy8.values, wt, dy8.inverse * w_inverse, ctx.dtypes[0], exact=True)
        dw = product(dy8.transposed, xt, dy8.inverse * x_inverse, ctx.dtypes[1], exact=True)
        return dx, dw, None, None, None, None, None


def check_history(op: str, history: Tensor | None, rows: int) -> None:
    """Raises ValueError when a history is not (rows, HISTORY) float32."""
    if history is not None and (history.shape != (rows, HISTORY) or history.dtype != torch.float32):
        raise ValueError(
            f"{op}: history is {tuple(history.shape)} {history.dtype}, wanted ({rows}, {HISTORY}) torch.float32"
        )


def runs(op: str, x: Tensor) -> bool:
    """As triton_runs. Raises ValueError for float16, whose range the gradients would leave before they are rounded."""
    if x.dtype == torch.float16:
        raise ValueError(f"{op}: x is torch.float16, wanted bfloat16 or float32")
    return triton_runs(op, x, x.size(-1))


def fp8_linear_reference(x: Tensor | Quantized, weight: Tensor, history: Tensor | None = None) -> Tensor:
    return _apply(x, weight, history, fused=False)


def _fp8_linear_triton(x: Tensor | Quantized, weight: Tensor, history: Tensor | None = None) -> Tensor:
    return _apply(x, weight, history, fused=True)


def _apply(x: Tensor | Quantized, weight: Tensor, history: Tensor | None, fused: bool) -> Tensor:
    made = x.fp8 if isinstance(x, Quantized) else (None, None, None)
    x = plain(x)
    with without_autocast(x):
        out = _Fp8Linear.apply(as_rows(x), weight.contiguous(), *made, history, fused)
    return out.view(*x.shape[:-1], weight.size(0))


def fp8_linear(x: Tensor | Quantized, weight: Tensor, history: Tensor | None = None) -> Tensor:
    """x·weightᵀ with both rounded to e4m3 under one scale each; gradients through e5m2.

    x: (..., C), float32 or bfloat16, or Quantized where its producer has rounded it already; weight: (F, C), any
    floating dtype; history: None for current scaling, or (3, HISTORY) float32 for delayed scaling, updated in place
    (rows: x, weight, gradient). Returns (..., F) in x's dtype; weight's gradient has its own. Raises ValueError when
    shapes or dtypes do not fit.
    """
    values = plain(x)
    if weight.ndim != 2 or weight.size(1) != values.size(-1):
        raise ValueError(f"fp8_linear: weight is {tuple(weight.shape)} but x has C={values.size(-1)}, wanted (F, C)")
    check_device("fp8_linear", values, weight=weight)
    check_history("fp8_linear", history, len(ROLES))
    return _apply(x, weight, history, runs("fp8_linear", values))


CASES = {
    "odd": dict(N=37, C=48, F=80),
    "d4": dict(N=512, C=256, F=1024),
    "d12": dict(N=32 * 2048, C=768, F=3072),
    "d24": dict(N=16 * 2048, C=1536, F=6144),
    "d32": dict(N=8 * 2048, C=2048, F=8192),
}


def probe(size: int) -> tuple[Case, ...]:
    """Of sizes that fp8 units take, but for C, which is given."""
    return (dict(N=80, C=size, F=96),)


register(
    Op(
        name="fp8_linear",
        fn=fp8_linear,
        reference=fp8_linear_reference,
        inputs=_inputs,
        cases=CASES,
        flops=lambda case: 2 * case["N"] * case["C"] * case["F"],
        bytes=lambda case, dtype: (
            (case["N"] * case["C"] + case["F"] * case["C"] + case["N"] * case["F"]) * itemsize(dtype)
        ),
        # Against the unrounded product: 3 mantissa bits, twice.
        tolerance={torch.float32: 0.05, torch.bfloat16: 0.05},
        differentiable=("x", "weight"),
        triton=_fp8_linear_triton,
        size=lambda case: case["C"],
        probe=probe,
    )
)
