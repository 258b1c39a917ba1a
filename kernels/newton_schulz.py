"""Orthogonalisation of a matrix by matrix products alone: Muon's inner loop.

Both push every singular value of X towards 1 by repeating an odd polynomial of X,

    A = X·Xᵀ,    X ← a·X + (b·A + c·A²)·X

(for tall matrices A = Xᵀ·X from the other side, so that A is the smaller square). `newton_schulz` repeats one fixed
quintic; `polar_express` uses at each step the polynomial that is best for the interval the singular values are in by
then, and gets closer in the same 5 steps. Per step and matrix (m ≤ n): 2·m²n + 2·m³ + 2·m²n FLOPs; A and A² are
symmetric, so nearly half of the first two products is redundant.

How the kernel is made: one kernel computes alpha·X·Xᵀ (or XᵀX) + beta·S, S symmetric, for both: A, and from A the
polynomial bA + cA² (A is its own transpose). Programs are numbered along the triangle of tiles on and below the
diagonal; a tile off the diagonal is stored twice, the second time turned. At 1536 with tiles of 128 that is 78 of 144
tiles, 54% of the work; the result is exactly symmetric. The third product has no symmetry and is left to cuBLAS, with
a·X added there.

All of it is 26 TFLOP a step at d24. On 8 GPUs the symmetry saves 0.1% of the step, about 2% for a small model on one:
it does not pay where the step is long, and where cuBLAS is twice as good as the compiler's loop it does not pay at all.

Sources: Jordan et al., Muon (kellerjordan.github.io/posts/muon); Amsel et al., The Polar Express, arXiv:2505.16932,
whose coefficients (with a safety factor) are tabulated below. Symmetric products in Muon: modded-nanogpt.
"""

import math
from functools import partial

import torch
from torch import Tensor

from . import tuned
from .dispatch import triton_runs
from .registry import Case, Op, itemsize, randn, register, wide
from .triton_utils import INTERPRETED, cdiv, launch, operator, product_tile, tl, triton

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
QUINTIC = (3.4445, -4.7750, 2.0315)


def _iterate(x: Tensor, coefficients: list[tuple[float, float, float]], fused: bool) -> Tensor:
    """X ← aX + (bA + cA²)X for each (a, b, c), from the side on which A is smaller. x: (..., m, n)."""
    tall = x.size(-2) > x.size(-1)
    if fused:
        shape, x = x.shape, x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]).contiguous()  # (K, m, n)
    for a, b, c in coefficients:
        if fused:
            gram = _symmetric_product(x, None, 1.0, 0.0, tall)  # (K, s, s), s = min(m, n)
            poly = _symmetric_product(gram, gram, c, b, False)
            x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
        else:
            gram = x.mT @ x if tall else x @ x.mT
            poly = b * gram + c * (gram @ gram)
            x = a * x + (x @ poly if tall else poly @ x)
    return x.view(shape) if fused else x


def _norm(g: Tensor) -> Tensor:
    """Of each matrix, (..., 1, 1). By rows first: of whole matrices Inductor makes one reduction and cuts it by the
    card's multiprocessors, where rows need not begin or end; elements are then read one by one.
    """
    rows = torch.linalg.vector_norm(g, dim=-1, keepdim=True, dtype=wide(g.dtype))  # (..., m, 1)
    return torch.linalg.vector_norm(rows, dim=-2, keepdim=True)


def _polar_express(g: Tensor, steps: int, fused: bool) -> Tensor:
    return _iterate((g / (_norm(g) * 1.01 + 1e-6)).to(g.dtype), list(POLAR_EXPRESS[:steps]), fused)


def _newton_schulz(g: Tensor, steps: int, fused: bool) -> Tensor:
    return _iterate((g / (_norm(g) + 1e-7)).to(g.dtype), [QUINTIC] * steps, fused)


def polar_express_reference(g: Tensor, steps: int = 5) -> Tensor:
    return _polar_express(g, steps, fused=False)


def newton_schulz_reference(g: Tensor, steps: int = 5) -> Tensor:
    return _newton_schulz(g, steps, fused=False)


# ---- Triton


@triton.jit
def _symmetric_kernel(
    x_ptr, add_ptr, out_ptr, S, R, tiles, alpha, beta,
    TURNED: tl.constexpr, ADD: tl.constexpr, UPCAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = alpha·X·Xᵀ + beta·add for X (S, R); TURNED: XᵀX for X (R, S). All contiguous; `tiles` programs a matrix.

    A program owns tile (i, j), j ≤ i, of one matrix, and walks over R.
    """
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)  # where rounding went up, or down
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    x_ptr += batch * S * R
    rows = i * BLOCK_S + tl.arange(0, BLOCK_S)
    cols = j * BLOCK_S + tl.arange(0, BLOCK_S)
    total = product_tile(x_ptr, x_ptr, rows, cols, S, S, R, TURNED, TURNED, UPCAST, BLOCK_R)
    total = total * tl.cast(alpha, tl.float32)
    add_ptr += batch * S * S
    out_ptr += batch * S * S
    at = rows.to(tl.int64)[:, None] * S + cols[None, :]
    mask = (rows < S)[:, None] & (cols < S)[None, :]
    if ADD:
        total += tl.cast(beta, tl.float32) * tl.load(add_ptr + at, mask=mask, other=0.0).to(tl.float32)
    total = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, total, mask=mask)
    if i != j:
        at = cols.to(tl.int64)[:, None] * S + rows[None, :]
        tl.store(out_ptr + at, total.trans(), mask=(cols < S)[:, None] & (rows < S)[None, :])


@operator()
def _symmetric_product(x: Tensor, add: Tensor | None, alpha: float, beta: float, turned: bool) -> Tensor:
    """alpha·x·xᵀ + beta·add (turned: xᵀx) of contiguous stacks (K, m, n); add and the result are (K, s, s)."""
    k, m, n = x.shape
    s, r = (n, m) if turned else (m, n)
    config = tuned.config("polar_express", x.dtype, s, x.device)
    blocks = cdiv(s, config["BLOCK_S"])
    tiles = blocks * (blocks + 1) // 2
    out = x.new_empty((k, s, s))
    launch(
        _symmetric_kernel, (k * tiles,), x, x if add is None else add, out, s, r, tiles, alpha, beta, TURNED=turned,
        ADD=add is not None, UPCAST=INTERPRETED and x.dtype == torch.bfloat16, **config,
    )  # fmt: skip
    return out


# ---- the public functions


def polar_express(g: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor of g's polar decomposition, approximately. g: (..., m, n), any floating dtype.

    Returns the same shape and dtype, singular values near 1 (a zero matrix stays zero). Raises ValueError when g is not
    a (stack of) matrices or steps is not 1–5.
    """
    _check("polar_express", g)
    if not 1 <= steps <= len(POLAR_EXPRESS):
        raise ValueError(f"polar_express: steps is {steps}, wanted 1 to {len(POLAR_EXPRESS)} (one polynomial each)")
    return _polar_express(g, steps, triton_runs("polar_express", g, min(g.shape[-2:])))


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """The same with one fixed quintic, Muon's original. g: (..., m, n). Raises ValueError as `polar_express`."""
    _check("newton_schulz", g)
    if steps < 1:
        raise ValueError(f"newton_schulz: steps is {steps}, wanted at least 1")
    return _newton_schulz(g, steps, triton_runs("newton_schulz", g, min(g.shape[-2:])))


def _check(op: str, g: Tensor) -> None:
    if g.ndim < 2 or not g.is_floating_point():
        raise ValueError(f"{op}: g is {tuple(g.shape)} {g.dtype}, wanted floating (..., m, n)")


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
for _name, _fn, _reference, _triton in (
    ("polar_express", polar_express, polar_express_reference, partial(_polar_express, steps=5, fused=True)),
    ("newton_schulz", newton_schulz, newton_schulz_reference, partial(_newton_schulz, steps=5, fused=True)),
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
            triton=_triton,
            size=lambda case: min(case["m"], case["n"]),
            # Matrices far from square have no small singular values, at which the iteration amplifies rounding.
            probe=lambda size: (dict(K=2, m=size, n=2 * size), dict(K=1, m=2 * size, n=size)),
        )
    )
