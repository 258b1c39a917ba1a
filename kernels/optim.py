"""The optimizers' pointwise parts: everything of AdamW, and what surrounds Muon's orthogonalisation.

    adamw_            decoupled decay, moments, bias-corrected step, in one pass over a tensor
    muon_momentum_    Nesterov momentum, then every row scaled to the same norm ("row equilibration")
    muon_update_      renormalise, NorMuon's per-row variance, cautious weight decay, step

Memory-bound; an AdamW step must read param, grad, two moments and write three of them (7 tensors), while one PyTorch
call per operation moves about 20. Scalars may be Python floats or 0-d tensors: pass tensors under `torch.compile`, or
every new learning rate compiles again. Moments live in the parameter's dtype, arithmetic in float32.

Sources: AdamW: Loshchilov & Hutter, arXiv:1711.05101; Muon: Jordan et al.; NorMuon: Li et al., arXiv:2510.05491;
cautious decay: Chen et al., arXiv:2510.12402; this combination as in nanochat and modded-nanogpt.
"""

import torch
from torch import Tensor

from kernels.registry import Case, Op, itemsize, randn, register

Scalar = float | Tensor


def adamw_reference_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Scalar,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: Scalar,
    weight_decay: Scalar,
) -> None:
    wide = _wide(param)
    g = grad.to(wide)
    m = exp_avg.to(wide) * beta1 + g * (1 - beta1)
    v = exp_avg_sq.to(wide) * beta2 + g * g * (1 - beta2)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    denominator = (v / (1 - beta2**step)).sqrt_() + eps
    p = param.to(wide) * (1 - lr * weight_decay) - m / denominator * (lr / (1 - beta1**step))
    param.copy_(p)


def muon_momentum_reference_(grad: Tensor, momentum_buffer: Tensor, momentum: Scalar, dtype: torch.dtype) -> Tensor:
    momentum_buffer.copy_(momentum_buffer * momentum + grad * (1 - momentum))
    g = (grad * (1 - momentum) + momentum_buffer * momentum).to(dtype)  # (K, m, n), Nesterov
    wide = _wide(g)
    row = torch.linalg.vector_norm(g, dim=-1, keepdim=True, dtype=wide)  # (K, m, 1)
    whole = torch.linalg.vector_norm(row, dim=-2, keepdim=True)  # (K, 1, 1)
    return g * (whole * g.size(-2) ** -0.5 / row.clamp_min(1e-6)).to(dtype)


def muon_update_reference_(
    param: Tensor, update: Tensor, second_moment: Tensor, lr: Scalar, weight_decay: Scalar, beta2: Scalar
) -> None:
    m, n = param.shape[-2:]
    wide = _wide(param)
    x = update.to(wide)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x * (min(m, n) ** 0.5 / norm.clamp_min(1e-10))
    dim, size = (-1, n) if m >= n else (-2, m)
    variance = x.square().mean(dim=dim, keepdim=True)  # (K, m, 1) or (K, 1, n)
    second_moment.copy_(second_moment * beta2 + variance * (1 - beta2))
    scale = second_moment.to(wide).clamp_min(1e-10).rsqrt()
    before = (variance * size).sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (variance * size * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    x = x * (scale * (before / after.clamp_min(1e-10)))
    p = param.to(wide)
    param.copy_(p - lr * x - lr * weight_decay * p * (x * p >= 0))


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Scalar,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: Scalar,
    weight_decay: Scalar,
) -> None:
    """One AdamW step in place: changes param, exp_avg, exp_avg_sq, all of one shape and any floating dtype.

    step counts from 1. Decay comes first: param ← param·(1 − lr·weight_decay). Raises ValueError when shapes differ.
    """
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _fits("adamw_", name, tensor, param.shape)
    adamw_reference_(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay)


def muon_momentum_(grad: Tensor, momentum_buffer: Tensor, momentum: Scalar, dtype: torch.dtype) -> Tensor:
    """Updates momentum_buffer (K, m, n) in place; returns the Nesterov gradient with equal row norms, in `dtype`.

    Every row is scaled to ‖g‖_F/√m of its own matrix. Raises ValueError when shapes differ.
    """
    _fits("muon_momentum_", "momentum_buffer", momentum_buffer, grad.shape)
    return muon_momentum_reference_(grad, momentum_buffer, momentum, dtype)


def muon_update_(
    param: Tensor, update: Tensor, second_moment: Tensor, lr: Scalar, weight_decay: Scalar, beta2: Scalar
) -> None:
    """Steps param (K, m, n) in place along `update`, the orthogonalised gradient of the same shape.

    second_moment is (K, m, 1) when m ≥ n, else (K, 1, n), changed in place. Decay applies only where update and param
    have the same sign. Raises ValueError when shapes do not fit.
    """
    _fits("muon_update_", "update", update, param.shape)
    _fits("muon_update_", "second_moment", second_moment, second_moment_shape(param.shape))
    muon_update_reference_(param, update, second_moment, lr, weight_decay, beta2)


def second_moment_shape(shape: torch.Size) -> torch.Size:
    """Shape of NorMuon's second moment for a stack of matrices (K, m, n)."""
    k, m, n = shape
    return torch.Size((k, m, 1) if m >= n else (k, 1, n))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fits(op: str, name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, wanted {tuple(shape)}")


def _adamw_inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    shape = (case["N"],)
    return dict(
        param=randn(shape, dtype, device, 0),
        grad=randn(shape, dtype, device, 1),
        exp_avg=randn(shape, dtype, device, 2, scale=0.1),
        exp_avg_sq=randn(shape, dtype, device, 3).abs(),
        step=3,
        lr=0.01,
        beta1=0.8,
        beta2=0.95,
        eps=1e-10,
        weight_decay=0.1,
    )


def _muon_momentum_inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    shape = (case["K"], case["m"], case["n"])
    return dict(
        grad=randn(shape, dtype, device, 0), momentum_buffer=randn(shape, dtype, device, 1), momentum=0.95, dtype=dtype
    )


def _muon_update_inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    shape = torch.Size((case["K"], case["m"], case["n"]))
    return dict(
        param=randn(shape, dtype, device, 0, scale=0.1),
        update=randn(shape, dtype, device, 1),
        second_moment=randn(second_moment_shape(shape), dtype, device, 2).abs() * 0.1,
        lr=0.02,
        weight_decay=0.28,
        beta2=0.9,
    )


MATRICES = {
    "odd_wide": dict(K=2, m=33, n=70),
    "odd_tall": dict(K=3, m=70, n=33),
    "d4": dict(K=4, m=256, n=1024),
    "d24_mlp": dict(K=24, m=6144, n=1536),
}


def _stack(case: Case) -> int:
    return case["K"] * case["m"] * case["n"]


register(
    Op(
        name="adamw_",
        fn=adamw_,
        reference=adamw_reference_,
        inputs=_adamw_inputs,
        cases={"odd": dict(N=1001), "d4": dict(N=4096 * 256), "d24": dict(N=32768 * 1536)},
        flops=lambda case: 14 * case["N"],
        bytes=lambda case, dtype: 7 * case["N"] * itemsize(dtype),
        mutates=("param", "exp_avg", "exp_avg_sq"),
    )
)
register(
    Op(
        name="muon_momentum_",
        fn=muon_momentum_,
        reference=muon_momentum_reference_,
        inputs=_muon_momentum_inputs,
        cases=MATRICES,
        flops=lambda case: 9 * _stack(case),
        bytes=lambda case, dtype: 4 * _stack(case) * itemsize(dtype),
        mutates=("momentum_buffer",),
    )
)
register(
    Op(
        name="muon_update_",
        fn=muon_update_,
        reference=muon_update_reference_,
        inputs=_muon_update_inputs,
        cases=MATRICES,
        flops=lambda case: 13 * _stack(case),
        bytes=lambda case, dtype: 3 * _stack(case) * itemsize(dtype),
        mutates=("param", "second_moment"),
    )
)
