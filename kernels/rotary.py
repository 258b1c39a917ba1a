"""Rotary position embedding, alone and fused with the QK norm.

With the head split in halves x = [x1, x2] (not in even and odd lanes):

    y1 = x1·cos + x2·sin,    y2 = −x1·sin + x2·cos

which rotates by −θ; only the difference of two positions' angles reaches the attention scores, so the sign is a
convention, kept because checkpoints depend on it. `qk_norm_rotary` then divides each head by its RMS and multiplies by
`scale` (applied to q and to k, so the scores grow by scale²).

Memory-bound: 6 FLOPs (rotary) + 5 (norm) per element, 2 elements moved. As separate calls: rotary 2U, norm 2U, scale 2U
for q and again for k; fused: 2U each, in one launch. `torch.compile` finds this fusion too.

Source: Su et al., RoFormer, arXiv:2104.09864; QK norm: Dehghani et al., arXiv:2302.05442.
"""

import torch
from torch import Tensor

from kernels.registry import Case, Op, itemsize, randn, register
from kernels.rms_norm import rms_norm_reference


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :, None, :].to(x.dtype), sin[..., :, None, :].to(x.dtype)  # (T, 1, D/2): broadcast over heads
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def qk_norm_rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q = rms_norm_reference(rotary_reference(q, cos, sin))
    k = rms_norm_reference(rotary_reference(k, cos, sin))
    return (q, k) if scale == 1.0 else (q * scale, k * scale)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, D), D even, with cos and sin (T, D/2), or (B, T, D/2) for positions by row.

    Returns (B, T, H, D) in x's dtype. Raises ValueError when the shapes do not fit.
    """
    _check("rotary", "x", x, cos, sin)
    return rotary_reference(x, cos, sin)


def qk_norm_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rotary, then RMS norm per head, then times `scale`, for q (B, T, H, D) and k (B, T, K, D).

    cos, sin: (T, D/2), or (B, T, D/2). Returns (q, k) in their shapes and dtypes. Raises ValueError when the shapes do
    not fit.
    """
    _check("qk_norm_rotary", "q", q, cos, sin)
    _check("qk_norm_rotary", "k", k, cos, sin)
    return qk_norm_rotary_reference(q, k, cos, sin, scale)


def _check(op: str, name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.ndim != 4 or x.size(-1) % 2:
        raise ValueError(f"{op}: {name} is {tuple(x.shape)}, wanted (B, T, H, D) with D even")
    wanted = (x.size(1), x.size(3) // 2)
    if cos.shape != sin.shape or cos.shape[-2:] != wanted or cos.shape[:-2] not in ((), (x.size(0),)):
        raise ValueError(
            f"{op}: cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}, wanted (T, D/2) = {wanted} "
            f"or with B={x.size(0)} before it, for {name} {tuple(x.shape)}"
        )


def _angles(case: Case, device: str) -> tuple[Tensor, Tensor]:
    inv_freq = 100_000.0 ** -(torch.arange(0, case["D"], 2).double() / case["D"])
    angle = torch.outer(torch.arange(case["T"]).double(), inv_freq)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def _inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    cos, sin = _angles(case, device)
    q = randn((case["B"], case["T"], case["H"], case["D"]), dtype, device, 0)
    k = randn((case["B"], case["T"], case["K"], case["D"]), dtype, device, 1)
    return dict(q=q, k=k, cos=cos.to(dtype), sin=sin.to(dtype), scale=1.2)


def _rotary_inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    full = _inputs(case, dtype, device)
    return dict(x=full["q"], cos=full["cos"], sin=full["sin"])


CASES = {
    "one_token": dict(B=1, T=1, H=2, K=1, D=64),
    "odd": dict(B=2, T=19, H=6, K=3, D=34),
    "d4": dict(B=4, T=256, H=4, K=4, D=64),
    "d12": dict(B=32, T=2048, H=6, K=6, D=128),
    "d24": dict(B=16, T=2048, H=12, K=12, D=128),
    "d32": dict(B=8, T=2048, H=16, K=16, D=128),
}


def _elements(case: Case, heads: int) -> int:
    return case["B"] * case["T"] * heads * case["D"]


register(
    Op(
        name="rotary",
        fn=rotary,
        reference=rotary_reference,
        inputs=_rotary_inputs,
        cases=CASES,
        flops=lambda case: 3 * _elements(case, case["H"]),
        bytes=lambda case, dtype: 2 * _elements(case, case["H"]) * itemsize(dtype),
        differentiable=("x",),
    )
)
register(
    Op(
        name="qk_norm_rotary",
        fn=qk_norm_rotary,
        reference=qk_norm_rotary_reference,
        inputs=_inputs,
        cases=CASES,
        flops=lambda case: 8 * _elements(case, case["H"] + case["K"]),
        bytes=lambda case, dtype: 2 * _elements(case, case["H"] + case["K"]) * itemsize(dtype),
        differentiable=("q", "k"),
    )
)
