"""A linear layer in 8-bit floating point: e4m3 (3 mantissa bits) forward, e5m2 (wider range) for the gradient.

Each tensor is scaled by one number so that its largest magnitude hits the format's largest (448 for e4m3, 57,344 for
e5m2), rounded, multiplied with float32 accumulation, and scaled back:

    y = q(x)·q(w)ᵀ / (sx·sw),     dx = q(dy)·q(w),     dw = q(dy)ᵀ·q(x)

Hopper and newer double the matrix rate in fp8, but finding the maximum, rounding and transposing are passes of their
own (8–12% of an fp8 step at d24) unless the producers of x and dy do them. This reference emulates the rounding exactly
with torch's float8 dtypes and multiplies in float32; it is for checking and for experiments, and slower than float32.

Source: Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433; tensorwise scaling as in torchao and
nanochat.
"""

import torch
from torch import Tensor

from kernels.registry import Case, Op, itemsize, randn, register

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def quantize_reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values, scale): values = round(x·scale) to the float8 `dtype`, held in float32; scale a float32 scalar."""
    largest = torch.finfo(dtype).max
    scale = largest / x.detach().abs().amax().float().clamp_min(1e-12)
    return (x.float() * scale).clamp(-largest, largest).to(dtype).float(), scale


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        (qx, sx), (qw, sw) = quantize_reference(x, E4M3), quantize_reference(weight, E4M3)
        return (qx @ qw.T / (sx * sw)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        (qx, sx), (qw, sw) = quantize_reference(x, E4M3), quantize_reference(weight, E4M3)
        qdy, sdy = quantize_reference(dy, E5M2)
        dx = (qdy @ qw / (sdy * sw)).to(x.dtype)
        dw = (qdy.flatten(0, -2).T @ qx.flatten(0, -2) / (sdy * sx)).to(weight.dtype)
        return dx, dw


def fp8_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    return _Fp8Linear.apply(x, weight)


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x·weightᵀ with both rounded to e4m3 under one scale each; gradients through e5m2.

    x: (..., C); weight: (F, C); float32 or bfloat16. Returns (..., F) in x's dtype. Raises ValueError when the shapes
    do not fit.
    """
    if weight.ndim != 2 or weight.size(1) != x.size(-1):
        raise ValueError(f"fp8_linear: weight is {tuple(weight.shape)} but x has C={x.size(-1)}, wanted (F, C)")
    return fp8_linear_reference(x, weight)


def _inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    return dict(
        x=randn((case["N"], case["C"]), dtype, device, 0),
        weight=randn((case["F"], case["C"]), dtype, device, 1, scale=case["C"] ** -0.5),
    )


register(
    Op(
        name="fp8_linear",
        fn=fp8_linear,
        reference=fp8_linear_reference,
        inputs=_inputs,
        cases={
            "odd": dict(N=37, C=48, F=80),
            "d4": dict(N=512, C=256, F=1024),
            "d24": dict(N=16 * 2048, C=1536, F=6144),
        },
        flops=lambda case: 2 * case["N"] * case["C"] * case["F"],
        bytes=lambda case, dtype: (
            case["N"] * case["C"] + case["F"] * case["C"] + case["N"] * case["F"] * itemsize(dtype)
        ),
        # Against the unrounded product: 3 mantissa bits, twice.
        tolerance={torch.float32: 0.05, torch.bfloat16: 0.05},
        differentiable=("x", "weight"),
    )
)
