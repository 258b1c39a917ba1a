"""Rotary position embedding, alone and fused with the QK norm.

With the head split in halves x = [x1, x2] (not in even and odd lanes):

    y1 = x1·cos + x2·sin,    y2 = −x1·sin + x2·cos

which rotates by −θ; only the difference of two positions' angles reaches the attention scores, so the sign is a
convention, kept because checkpoints depend on it. `qk_norm_rotary` then divides each head by its RMS and multiplies by
`scale` (applied to q and to k, so the scores grow by scale²).

Memory-bound: 6 FLOPs (rotary) + 5 (norm) per element, 2 elements moved. As separate calls: rotary 2U, norm 2U, scale 2U
for q and again for k; fused: 2U each, in one launch. `torch.compile` finds this fusion too.

How the kernels are made: a program owns some tokens, reads their angles once, and walks over the heads of q, then of k,
each as two tiles (BLOCK_N, D/2), left and right halves, so that every load is contiguous and nothing is shuffled.
Backward turns the other way (sin with its sign changed), after the norm's own backward on the head turned again. cos
and sin get no gradient.

Source: Su et al., RoFormer, arXiv:2104.09864; QK norm: Dehghani et al., arXiv:2302.05442.
"""

import torch
from torch import Tensor

from . import tuned
from .dispatch import triton_runs
from .registry import Case, Op, check_device, itemsize, randn, register
from .rms_norm import default_eps, rms_norm_reference
from .triton_utils import cdiv, launch, operator, power_of_two, tl, triton

LARGEST_HEAD = 1024


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :, None, :].to(x.dtype), sin[..., :, None, :].to(x.dtype)  # (T, 1, D/2): broadcast over heads
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def qk_norm_rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q = rms_norm_reference(rotary_reference(q, cos, sin))
    k = rms_norm_reference(rotary_reference(k, cos, sin))
    return (q, k) if scale == 1.0 else (q * scale, k * scale)


# ---- Triton


@triton.jit
def _turn(
    x_ptr, dy_ptr, y_ptr, tokens, head, cos, sin, mask, scale, eps,
    H: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of some tokens, (BLOCK_N, D): forward, or the gradient of x from dy."""
    left = (tokens.to(tl.int64) * H + head)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    right = left + D // 2
    if NORM or not BACKWARD:
        x1 = tl.load(x_ptr + left, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + right, mask=mask, other=0.0).to(tl.float32)
        y1 = x1 * cos + x2 * sin
        y2 = x2 * cos - x1 * sin
        if NORM:
            rstd = tl.rsqrt((tl.sum(y1 * y1, axis=1) + tl.sum(y2 * y2, axis=1)) / D + tl.cast(eps, tl.float32))[:, None]
            y1 = y1 * rstd
            y2 = y2 * rstd
    if BACKWARD:
        d1 = tl.load(dy_ptr + left, mask=mask, other=0.0).to(tl.float32)
        d2 = tl.load(dy_ptr + right, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            along = ((tl.sum(d1 * y1, axis=1) + tl.sum(d2 * y2, axis=1)) / D)[:, None]
            factor = tl.cast(scale, tl.float32) * rstd
            d1 = factor * (d1 - y1 * along)
            d2 = factor * (d2 - y2 * along)
        tl.store(y_ptr + left, d1 * cos - d2 * sin, mask=mask)
        tl.store(y_ptr + right, d2 * cos + d1 * sin, mask=mask)
    else:
        if NORM:
            y1 = y1 * tl.cast(scale, tl.float32)
            y2 = y2 * tl.cast(scale, tl.float32)
        tl.store(y_ptr + left, y1, mask=mask)
        tl.store(y_ptr + right, y2, mask=mask)


@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, dq_ptr, dk_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, N, T, scale, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BY_ROW: tl.constexpr, NORM: tl.constexpr,
    BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N of N = B·T tokens, reads their angles once, and walks over the heads of q, then of k."""
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)  # of one half
    half: tl.constexpr = D // 2
    mask = (tokens < N)[:, None] & (cols < half)[None, :]
    rows = tokens if BY_ROW else tokens % T
    angle = rows.to(tl.int64)[:, None] * half + cols[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    for head in range(H):
        _turn(q_ptr, dq_ptr, q_out_ptr, tokens, head, cos, sin, mask, scale, eps, H, D, NORM, BACKWARD, BLOCK_D)
    for head in range(K):
        _turn(k_ptr, dk_ptr, k_out_ptr, tokens, head, cos, sin, mask, scale, eps, K, D, NORM, BACKWARD, BLOCK_D)


def _rotate(
    op: str, x: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Launches for (q, k), or for the gradients; without a k (one of no heads), only q is turned."""
    q, k = x
    out = (torch.empty_like(q), torch.empty_like(k))
    dq, dk = grads or x
    config = tuned.config(op, q.dtype, q.size(3), q.device)
    block_d = power_of_two(q.size(3) // 2)
    block_n = max(1, config.pop("elements") // (2 * block_d))
    tokens = q.size(0) * q.size(1)
    launch(
        _rotary_kernel, (cdiv(tokens, block_n),), q, k, dq, dk, *out, cos, sin, tokens, q.size(1), scale,
        default_eps(q.dtype), H=q.size(2), K=k.size(2), D=q.size(3), BY_ROW=cos.ndim == 3,
        NORM=op == "qk_norm_rotary", BACKWARD=grads is not None, BLOCK_N=block_n, BLOCK_D=block_d, **config,
    )  # fmt: skip
    return out


@operator()
def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotate("rotary", (x, x[:, :, :0]), None, cos, sin, 1.0)[0]


@operator()
def _rotary_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotate("rotary", (dy, dy[:, :, :0]), (dy, dy[:, :, :0]), cos, sin, 1.0)[0]


@operator()
def _qk_norm_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _rotate("qk_norm_rotary", (q, k), None, cos, sin, scale)


@operator()
def _qk_norm_rotary_backward(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _rotate("qk_norm_rotary", (q, k), (dq, dk), cos, sin, scale)


def _save_rotary(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _rotary_gradients(ctx, dy):
    return _rotary_backward(dy.contiguous(), *ctx.saved_tensors), None, None


def _save_qk(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _qk_gradients(ctx, dq, dk):
    return *_qk_norm_rotary_backward(dq.contiguous(), dk.contiguous(), *ctx.saved_tensors, ctx.scale), None, None, None


_rotary.register_autograd(_rotary_gradients, setup_context=_save_rotary)
_qk_norm_rotary.register_autograd(_qk_gradients, setup_context=_save_qk)


def _rotary_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotary(x.contiguous(), cos.contiguous(), sin.contiguous())


def _qk_norm_rotary_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return _qk_norm_rotary(q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous(), float(scale))


# ---- the public functions


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, D), D even, with cos and sin (T, D/2), or (B, T, D/2) for positions by row.

    Returns (B, T, H, D) in x's dtype. Raises ValueError when the shapes do not fit.
    """
    _check("rotary", "x", x, cos, sin)
    if triton_runs("rotary", x, x.size(-1), LARGEST_HEAD):
        return _rotary_triton(x, cos, sin)
    return rotary_reference(x, cos, sin)


def qk_norm_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rotary, then RMS norm per head, then times `scale`, for q (B, T, H, D) and k (B, T, K, D).

    cos, sin: (T, D/2), or (B, T, D/2). Returns (q, k) in their shapes and dtypes. Raises ValueError when the shapes do
    not fit.
    """
    _check("qk_norm_rotary", "q", q, cos, sin)
    _check("qk_norm_rotary", "k", k, cos, sin)
    if k.dtype != q.dtype or k.size(0) != q.size(0) or k.size(3) != q.size(3):
        raise ValueError(
            f"qk_norm_rotary: k is {tuple(k.shape)} {k.dtype} and q {tuple(q.shape)} {q.dtype}; "
            "only their numbers of heads may differ"
        )
    if triton_runs("qk_norm_rotary", q, q.size(-1), LARGEST_HEAD):
        return _qk_norm_rotary_triton(q, k, cos, sin, scale)
    return qk_norm_rotary_reference(q, k, cos, sin, scale)


def _check(op: str, name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.ndim != 4 or x.size(-1) % 2:
        raise ValueError(f"{op}: {name} is {tuple(x.shape)}, wanted (B, T, H, D) with D even")
    check_device(op, x, cos=cos, sin=sin)
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


def _probe(size: int) -> tuple[Case, ...]:
    return (dict(B=2, T=19, H=6, K=3, D=size),)


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
        triton=_rotary_triton,
        size=lambda case: case["D"],
        probe=_probe,
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
        triton=_qk_norm_rotary_triton,
        size=lambda case: case["D"],
        probe=_probe,
    )
)
