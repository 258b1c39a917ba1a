"""Orthogonalisation of a matrix by matrix products alone: Muon's inner loop.

Both push every singular value of X towards 1 by repeating an odd polynomial of X,

    A = X·Xᵀ,    X ← a·X + (b·A + c·A²)·X

(for tall matrices A = Xᵀ·X from the other side, so that A is the smaller square). `newton_schulz` repeats one fixed
quintic; `polar_express` uses at each step the polynomial that is best for the interval the singular values are in by
then, and gets closer in the same 5 steps. Per step and matrix (m ≤ n): 2·m²n + 2·m³ + 2·m²n FLOPs; A and A² are
symmetric, so nearly half of the first two products is redundant, which a kernel can skip.

It is 26 TFLOP a step at d24: 0.1% of the step on 8 GPUs, about 2% for a small model on one.

Sources: Jordan et al., Muon (kellerjordan.github.io/posts/muon); Amsel et al., The Polar Express, arXiv:2505.16932,
whose coefficients (with a safety factor) are tabulated below.
"""

import torch
from torch import Tensor

from kernels.registry import Case, Op, itemsize, randn, register

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
QUINTIC = (3.4445, -4.7750, 2.0315)


def _iterate(x: Tensor, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """X ← aX + (bA + cA²)X for each (a, b, c), from the side on which A is smaller. x: (..., m, n)."""
    tall = x.size(-2) > x.size(-1)
    for a, b, c in coefficients:
        gram = x.mT @ x if tall else x @ x.mT  # (..., s, s), s = min(m, n)
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if tall else poly @ x)
    return x


def polar_express_reference(g: Tensor, steps: int = 5) -> Tensor:
    norm = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True, dtype=_wide(g))
    return _iterate(g / (norm * 1.01 + 1e-6).to(g.dtype), list(POLAR_EXPRESS[:steps]))


def newton_schulz_reference(g: Tensor, steps: int = 5) -> Tensor:
    norm = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True, dtype=_wide(g))
    return _iterate(g / (norm + 1e-7).to(g.dtype), [QUINTIC] * steps)


def polar_express(g: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor of g's polar decomposition, approximately. g: (..., m, n), any floating dtype.

    Returns the same shape and dtype, singular values near 1 (a zero matrix stays zero). Raises ValueError when g is not
    a (stack of) matrices or steps is not 1–5.
    """
    _check("polar_express", g)
    if not 1 <= steps <= len(POLAR_EXPRESS):
        raise ValueError(f"polar_express: steps is {steps}, wanted 1 to {len(POLAR_EXPRESS)} (one polynomial each)")
    return polar_express_reference(g, steps)


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """The same with one fixed quintic, Muon's original. g: (..., m, n). Raises ValueError as `polar_express`."""
    _check("newton_schulz", g)
    if steps < 1:
        raise ValueError(f"newton_schulz: steps is {steps}, wanted at least 1")
    return newton_schulz_reference(g, steps)


def _check(op: str, g: Tensor) -> None:
    if g.ndim < 2 or not g.is_floating_point():
        raise ValueError(f"{op}: g is {tuple(g.shape)} {g.dtype}, wanted floating (..., m, n)")


def _wide(g: Tensor) -> torch.dtype:
    return torch.float64 if g.dtype == torch.float64 else torch.float32


def _flops(case: Case) -> int:
    small, large = sorted((case["m"], case["n"]))
    return case["K"] * 5 * (4 * small * small * large + 2 * small**3)


CASES = {
    "odd_wide": dict(K=2, m=33, n=70),
    "odd_tall": dict(K=3, m=70, n=33),
    "d4": dict(K=4, m=256, n=256),
    "d24_attn": dict(K=24, m=1536, n=1536),
    "d24_mlp": dict(K=24, m=6144, n=1536),
}
for _name, _fn, _reference in (
    ("polar_express", polar_express, polar_express_reference),
    ("newton_schulz", newton_schulz, newton_schulz_reference),
):
    register(
        Op(
            name=_name,
            fn=_fn,
            reference=_reference,
            inputs=lambda case, dtype, device: dict(g=randn((case["K"], case["m"], case["n"]), dtype, device)),
            cases=CASES,
            flops=_flops,
            bytes=lambda case, dtype: 2 * case["K"] * case["m"] * case["n"] * itemsize(dtype),
            # The iteration amplifies rounding by its slope at small singular values, up to 8 a step.
            tolerance={torch.float32: 2e-4, torch.bfloat16: 0.2, torch.float16: 0.05},
        )
    )
