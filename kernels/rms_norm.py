"""RMS norm, alone and fused with what stands before it in a transformer block.

    rms_norm(x)                = x / sqrt(mean(x², last dim) + eps) [· weight]
    mix_rms_norm(x, x0, a, b)  : mixed = a·x + b·x0,    normed = rms_norm(mixed)
    add_rms_norm(x, delta)     : summed = x + delta,    normed = rms_norm(summed)

All work on (..., C) and never mix rows, so they are bound by memory: about 4·C FLOPs for 2·C elements moved. With
U = rows · C · itemsize, as separate PyTorch calls mix_rms_norm moves 2U + U (a·x), 2U (b·x0), 3U (sum), 2U (norm);
fused it reads x and x0 and writes mixed and normed: 4U. `torch.compile` finds the same fusion, so a hand-written
kernel pays only where the compiler's own is slow, or where nothing is compiled (eager inference).

The epsilon is float32's machine epsilon for float32, bfloat16 and float16 alike, because the statistics are computed
in float32 (this is also what `torch.nn.functional.rms_norm` does); bfloat16's own epsilon would be 65,536 times larger.

Source: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467; the fusion as in Liger-Kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.registry import Case, Op, itemsize, randn, register


def default_eps(dtype: torch.dtype) -> float:
    """Machine epsilon of the dtype in which the statistics are computed: float64's own, else float32's 2⁻²³."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), weight, default_eps(x.dtype) if eps is None else eps)


def mix_rms_norm_reference(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    mixed = a.to(x.dtype) * x + b.to(x.dtype) * x0
    return mixed, rms_norm_reference(mixed)


def add_rms_norm_reference(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + delta
    return summed, rms_norm_reference(summed)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x / rms(x) over the last dimension.

    x: (..., C), any floating dtype; weight: (C,) or None; eps: None for the default above. Returns (..., C) in x's
    dtype. Raises ValueError when weight is not (C,).
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight is {tuple(weight.shape)} but x has C={x.size(-1)}, so it must be (C,)")
    return rms_norm_reference(x, weight, eps)


def mix_rms_norm(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(mixed, normed) with mixed = a·x + b·x0 and normed = rms_norm(mixed).

    x, x0: (..., C) of one shape and dtype; a, b: tensors of one element, gradients flow to both. Both results are
    (..., C) in x's dtype. Raises ValueError when shapes or dtypes differ.
    """
    _same("mix_rms_norm", "x0", x0, x)
    for name, scalar in (("a", a), ("b", b)):
        if scalar.numel() != 1:
            raise ValueError(f"mix_rms_norm: {name} has {scalar.numel()} elements, wanted a tensor of one")
    return mix_rms_norm_reference(x, x0, a, b)


def add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(summed, normed) with summed = x + delta and normed = rms_norm(summed).

    x, delta: (..., C) of one shape and dtype. Raises ValueError when shapes or dtypes differ.
    """
    _same("add_rms_norm", "delta", delta, x)
    return add_rms_norm_reference(x, delta)


def _same(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.shape != x.shape or tensor.dtype != x.dtype:
        raise ValueError(
            f"{op}: {name} is {tuple(tensor.shape)} {tensor.dtype} but x is {tuple(x.shape)} {x.dtype}; they must agree"
        )


CASES = {
    "one_row": dict(N=1, C=128),
    "odd": dict(N=37, C=100),
    "d4": dict(N=2048, C=256),
    "d12": dict(N=32 * 2048, C=768),
    "d20": dict(N=32 * 2048, C=1280),
    "d24": dict(N=16 * 2048, C=1536),
    "d32": dict(N=8 * 2048, C=2048),
}


def _moved(rows: int):
    return lambda case, dtype: rows * case["N"] * case["C"] * itemsize(dtype)


def _x(case: Case, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    return randn((case["N"], case["C"]), dtype, device, seed)


register(
    Op(
        name="rms_norm",
        fn=rms_norm,
        reference=rms_norm_reference,
        inputs=lambda case, dtype, device: dict(
            x=_x(case, dtype, device, 0), weight=randn((case["C"],), dtype, device, 1)
        ),
        cases=CASES,
        flops=lambda case: 4 * case["N"] * case["C"],
        bytes=_moved(2),
        differentiable=("x", "weight"),
    )
)
register(
    Op(
        name="mix_rms_norm",
        fn=mix_rms_norm,
        reference=mix_rms_norm_reference,
        inputs=lambda case, dtype, device: dict(
            x=_x(case, dtype, device, 0),
            x0=_x(case, dtype, device, 1),
            a=torch.tensor(1.1, device=device),
            b=torch.tensor(0.2, device=device),
        ),
        cases=CASES,
        flops=lambda case: 7 * case["N"] * case["C"],
        bytes=_moved(4),
        differentiable=("x", "x0", "a", "b"),
    )
)
register(
    Op(
        name="add_rms_norm",
        fn=add_rms_norm,
        reference=add_rms_norm_reference,
        inputs=lambda case, dtype, device: dict(x=_x(case, dtype, device, 0), delta=_x(case, dtype, device, 1)),
        cases=CASES,
        flops=lambda case: 5 * case["N"] * case["C"],
        bytes=_moved(4),
        differentiable=("x", "delta"),
    )
)
