"""The first half of the MLP: relu(x·Wᵀ)².

2·N·C·F FLOPs. As separate passes the square costs a read and a write of (N, F) forward and three more backward: 4–5% of
a bf16 step at d24. In the GEMM's epilogue it is free, provided that the GEMM itself reaches 77% of cuBLAS; below that
the separate passes win. Because y = relu(h)², relu(h) = √y: a backward that stores only y can rebuild dy/dh = 2·√y (not
in float16, where squares of small activations underflow to zero).

Source: So et al., Primer, arXiv:2109.08668 (the squared ReLU); modded-nanogpt (the fused epilogue).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.registry import Case, Op, itemsize, randn, register


def linear_relu2_reference(x: Tensor, weight: Tensor) -> Tensor:
    return F.relu(F.linear(x, weight.to(x.dtype))).square()


def linear_relu2(x: Tensor, weight: Tensor) -> Tensor:
    """relu(x·weightᵀ)² for x (..., C) and weight (F, C), cast to x's dtype. Returns (..., F) in x's dtype.

    Raises ValueError when the shapes do not fit.
    """
    if weight.ndim != 2 or weight.size(1) != x.size(-1):
        raise ValueError(f"linear_relu2: weight is {tuple(weight.shape)} but x has C={x.size(-1)}, wanted (F, C)")
    return linear_relu2_reference(x, weight)


def _inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    return dict(
        x=randn((case["N"], case["C"]), dtype, device, 0),
        weight=randn((case["F"], case["C"]), dtype, device, 1, scale=case["C"] ** -0.5),
    )


register(
    Op(
        name="linear_relu2",
        fn=linear_relu2,
        reference=linear_relu2_reference,
        inputs=_inputs,
        cases={
            "odd": dict(N=37, C=50, F=70),
            "d4": dict(N=512, C=256, F=1024),
            "d12": dict(N=32 * 2048, C=768, F=3072),
            "d24": dict(N=16 * 2048, C=1536, F=6144),
        },
        flops=lambda case: 2 * case["N"] * case["C"] * case["F"],
        bytes=lambda case, dtype: (
            itemsize(dtype) * (case["N"] * case["C"] + case["F"] * case["C"] + case["N"] * case["F"])
        ),
        tolerance={torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3},
        differentiable=("x", "weight"),
    )
)
