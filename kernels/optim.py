"""The optimizers' pointwise parts: everything of AdamW, and what surrounds Muon's orthogonalisation.

    adamw_            decoupled decay, moments, bias-corrected step, in one pass over a tensor
    muon_momentum_    Nesterov momentum, then every row scaled to the same norm ("row equilibration")
    muon_update_      renormalise, NorMuon's per-row variance, cautious weight decay, step

Memory-bound; an AdamW step must read param, grad, two moments and write three of them (7 tensors), while one PyTorch
call per operation moves about 20. Scalars may be Python floats or 0-d tensors on the CPU: pass tensors under
`torch.compile`, or every new learning rate compiles again. Moments live in the parameter's dtype, arithmetic in
float32.

skip: 0-d int32 on the tensors' device; where it is not 0, nothing that an op changes is changed, to the bit. A device
that finds out itself that a gradient is not finite so tells its own kernels, and no host waits. None: 0.

How the kernels are made: adamw_ is one pass. The Muon parts need a norm of each row (or column) before they can go on,
so they are two passes each: one that reduces, one that applies a factor per row or column; what lies between is
arithmetic on vectors and stays in PyTorch. Every sum has one owner, so results are bitwise repeatable. `torch.compile`
fuses most of this as well: the kernels pay where nothing is compiled.

Sources: AdamW: Loshchilov & Hutter, arXiv:1711.05101; Muon: Jordan et al.; NorMuon: Li et al., arXiv:2510.05491;
cautious decay: Chen et al., arXiv:2510.12402; this combination as in nanochat and modded-nanogpt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import tuned
from .dispatch import Refused, mode, triton_runs
from .registry import Case, Op, check_device, itemsize, randn, register, wide
from .triton_utils import capturing, cdiv, launch, operator, power_of_two, tl, triton

Scalar = float | Tensor


def adamw_factors(
    step: Scalar, lr: Scalar, beta1: Scalar, beta2: Scalar, eps: Scalar, weight_decay: Scalar
) -> list[Scalar]:
    """What a step multiplies with: β₁, 1−β₁, β₂, 1−β₂, lr/(1−β₁^step), 1/(1−β₂^step), eps, 1−lr·decay."""
    rate, unbias = lr / (1 - beta1**step), 1 / (1 - beta2**step)
    return [beta1, 1 - beta1, beta2, 1 - beta2, rate, unbias, eps, 1 - lr * weight_decay]


def _put(old: Tensor, new: Tensor, skip: Tensor | None) -> None:
    """old ← new, unless it is to be skipped."""
    old.copy_(new if skip is None else torch.where(skip != 0, old, new.to(old.dtype)))


def _adamw_apply_reference_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: Sequence[Scalar], skip: Tensor | None
) -> None:
    beta1, rest1, beta2, rest2, rate, unbias, eps, keep = factors
    dtype = wide(param.dtype)
    g = grad.to(dtype)
    m = exp_avg.to(dtype) * beta1 + g * rest1
    v = exp_avg_sq.to(dtype) * beta2 + g * g * rest2
    _put(exp_avg, m, skip)
    _put(exp_avg_sq, v, skip)
    denominator = (v * unbias).sqrt_() + eps
    _put(param, param.to(dtype) * keep - m / denominator * rate, skip)


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
    skip: Tensor | None = None,
) -> None:
    factors = adamw_factors(step, lr, beta1, beta2, eps, weight_decay)
    _adamw_apply_reference_(param, grad, exp_avg, exp_avg_sq, factors, skip)


def muon_momentum_reference_(
    grad: Tensor, momentum_buffer: Tensor, momentum: Scalar, dtype: torch.dtype, skip: Tensor | None = None
) -> Tensor:
    _put(momentum_buffer, grad + (momentum_buffer - grad) * momentum, skip)
    g = (grad + (momentum_buffer - grad) * momentum).to(dtype)  # (K, m, n), Nesterov
    row = torch.linalg.vector_norm(g, dim=-1, keepdim=True, dtype=wide(g.dtype))  # (K, m, 1)
    whole = torch.linalg.vector_norm(row, dim=-2, keepdim=True)  # (K, 1, 1)
    return (g * (whole * (g.size(-2) or 1) ** -0.5 / row.clamp_min(1e-6))).to(dtype)


def _normuon_factor(
    squares: Tensor, shape: torch.Size, second_moment: Tensor, beta2: Scalar, skip: Tensor | None
) -> Tensor:
    """What to multiply the update with, by row or column; changes second_moment.

    squares: the update's sums of squares by row (K, m, 1) or column (K, 1, n), like second_moment.
    """
    m, n = shape[-2:]
    size = n if m >= n else m  # elements in each sum
    norm = squares.sum(dim=(-2, -1), keepdim=True).sqrt().clamp_min(1e-10)
    unit = min(m, n) ** 0.5 / norm  # to the Frobenius norm of an orthogonal matrix
    variance = squares * unit.square() / size
    _put(second_moment, second_moment * beta2 + variance * (1 - beta2), skip)
    scale = second_moment.to(squares.dtype).clamp_min(1e-10).rsqrt()
    before = (variance * size).sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (variance * size * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return unit * scale * (before / after.clamp_min(1e-10))


def muon_update_reference_(
    param: Tensor,
    update: Tensor,
    second_moment: Tensor,
    lr: Scalar,
    weight_decay: Scalar,
    beta2: Scalar,
    skip: Tensor | None = None,
) -> None:
    m, n = param.shape[-2:]
    x = update.to(wide(param.dtype))
    squares = x.square().sum(dim=-1 if m >= n else -2, keepdim=True)
    x = x * _normuon_factor(squares, param.shape, second_moment, beta2, skip)
    p = param.to(x.dtype)
    _put(param, p - lr * (x + weight_decay * (p * (x * p >= 0))), skip)


# ---- Triton


@triton.jit
def _adamw_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, skip_ptr, N, beta1, one_minus_beta1, beta2, one_minus_beta2, rate, v_factor,
    eps, keep, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK consecutive elements of all four tensors. rate and v_factor have the bias corrections."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32) * tl.cast(beta1, tl.float32)
    m += g * tl.cast(one_minus_beta1, tl.float32)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32) * tl.cast(beta2, tl.float32)
    v += g * g * tl.cast(one_minus_beta2, tl.float32)
    p = tl.load(param_ptr + at, mask=mask, other=0.0).to(tl.float32) * tl.cast(keep, tl.float32)
    p -= tl.cast(rate, tl.float32) * m / (tl.sqrt(v * tl.cast(v_factor, tl.float32)) + tl.cast(eps, tl.float32))
    mask = at < tl.where(tl.load(skip_ptr) == 0, N, 0)
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)
    tl.store(param_ptr + at, p, mask=mask)


@triton.jit
def _momentum_kernel(
    grad_ptr, buffer_ptr, out_ptr, squares_ptr, skip_ptr, rows, N, momentum,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M rows of N: new momentum, Nesterov gradient, and the gradient's sum of squares by row."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    momentum = tl.cast(momentum, tl.float32)
    written = row < tl.where(tl.load(skip_ptr) == 0, rows, 0)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        at = row.to(tl.int64)[:, None] * N + col[None, :]
        mask = (row < rows)[:, None] & (col < N)[None, :]
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        buffer = tl.load(buffer_ptr + at, mask=mask, other=0.0).to(tl.float32)
        buffer = buffer * momentum + g * (1.0 - momentum)
        g = (g * (1.0 - momentum) + buffer * momentum).to(out_ptr.dtype.element_ty)
        tl.store(buffer_ptr + at, buffer, mask=mask & written[:, None])
        tl.store(out_ptr + at, g, mask=mask)
        total += g.to(tl.float32) * g.to(tl.float32)
    tl.store(squares_ptr + row, tl.sum(total, axis=1), mask=row < rows)


@triton.jit
def _scale_rows_kernel(x_ptr, factor_ptr, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """x *= factor by row, in place; a program owns a tile (BLOCK_M, BLOCK_N)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    mask = (row < rows)[:, None] & (col < N)[None, :]
    factor = tl.load(factor_ptr + row, mask=row < rows, other=0.0)[:, None]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, x * factor, mask=mask)


@triton.jit
def _squares_kernel(x_ptr, squares_ptr, M, N, BY_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums of squares of a stack (K, M, N) by row or by column; a program owns BLOCK_M rows or BLOCK_N columns."""
    matrix = tl.program_id(1).to(tl.int64)
    x_ptr += matrix * M * N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = tl.program_id(0) * (BLOCK_M if BY_ROW else BLOCK_N)
    for start in range(0, N if BY_ROW else M, BLOCK_N if BY_ROW else BLOCK_M):
        row = (first if BY_ROW else start) + tl.arange(0, BLOCK_M)
        col = (start if BY_ROW else first) + tl.arange(0, BLOCK_N)
        mask = (row < M)[:, None] & (col < N)[None, :]
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * N + col[None, :], mask=mask, other=0.0).to(tl.float32)
        total += x * x
    if BY_ROW:
        row = first + tl.arange(0, BLOCK_M)
        tl.store(squares_ptr + matrix * M + row, tl.sum(total, axis=1), mask=row < M)
    else:
        col = first + tl.arange(0, BLOCK_N)
        tl.store(squares_ptr + matrix * N + col, tl.sum(total, axis=0), mask=col < N)


@triton.jit
def _step_kernel(
    param_ptr, update_ptr, factor_ptr, skip_ptr, M, N, lr, decay,
    BY_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """param −= lr·x + decay·param where they agree in sign, x = factor·update; a program owns a tile of one matrix."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix = tl.program_id(2).to(tl.int64)
    at = matrix * M * N + row.to(tl.int64)[:, None] * N + col[None, :]
    mask = (row < M)[:, None] & (col < N)[None, :]
    if BY_ROW:
        factor = tl.load(factor_ptr + matrix * M + row, mask=row < M, other=0.0)[:, None]
    else:
        factor = tl.load(factor_ptr + matrix * N + col, mask=col < N, other=0.0)[None, :]
    x = tl.load(update_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor
    p = tl.load(param_ptr + at, mask=mask, other=0.0).to(tl.float32)
    decayed = tl.where(x * p >= 0, tl.cast(decay, tl.float32) * p, 0.0)
    mask &= (row < tl.where(tl.load(skip_ptr) == 0, M, 0))[:, None]
    tl.store(param_ptr + at, p - tl.cast(lr, tl.float32) * x - decayed, mask=mask)


def _tile(op: str, x: Tensor) -> dict[str, int]:
    """BLOCK_M, BLOCK_N and num_warps for matrices with rows as long as x's."""
    config = tuned.config(op, x.dtype, x.size(-1), x.device)
    config["BLOCK_N"] = min(config["BLOCK_N"], max(16, power_of_two(x.size(-1))))
    config["BLOCK_M"] = max(1, config.pop("elements") // config["BLOCK_N"])
    return config


# Scalars that change reach the operators as 0-d tensors on the CPU: reading them waits for nothing, and a new learning
# rate compiles nothing again. Graphs only hand them on: arithmetic on them would be a C++ kernel in compiled code.


@operator(mutates=("param", "exp_avg", "exp_avg_sq"))
def _adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: Sequence[Tensor], skip: Tensor
) -> None:
    if isinstance(param, FakeTensor) and not capturing():
        return
    beta1, rest1, beta2, rest2, rate, unbias, eps, keep = _values(factors)
    config = tuned.config("adamw_", param.dtype, param.numel(), param.device)
    launch(
        _adamw_kernel, (cdiv(param.numel(), config["BLOCK"]),), param, grad, exp_avg, exp_avg_sq, skip,
        param.numel(), beta1, rest1, beta2, rest2, rate, unbias, eps, keep, **config,
    )  # fmt: skip


# `out` is given and not returned: of an operator that takes a CPU's scalar the compiler assumes that what it returns is
# not aligned, and reads it 2 bytes at a time.
@operator(mutates=("momentum_buffer", "out"))
def _muon_momentum(grad: Tensor, momentum_buffer: Tensor, out: Tensor, momentum: Tensor, skip: Tensor) -> None:
    if isinstance(grad, FakeTensor) and not capturing():
        return
    k, m, n = grad.shape
    squares = grad.new_empty((k, m, 1), dtype=torch.float32)
    config = _tile("muon_momentum_", grad)
    launch(
        _momentum_kernel, (cdiv(k * m, config["BLOCK_M"]),), grad, momentum_buffer, out, squares, skip, k * m, n,
        *_values([momentum]), **config,
    )  # fmt: skip
    whole = squares.sum(dim=-2, keepdim=True).sqrt()
    factor = whole * (m or 1) ** -0.5 / squares.sqrt().clamp_min(1e-6)
    grid = (cdiv(k * m, config["BLOCK_M"]), cdiv(n, config["BLOCK_N"]))
    launch(_scale_rows_kernel, grid, out, factor, k * m, n, **config)


@operator(mutates=("param", "second_moment"))
def _muon_update(
    param: Tensor, update: Tensor, second_moment: Tensor, lr: Tensor, weight_decay: Tensor, beta2: float, skip: Tensor
) -> None:
    if isinstance(param, FakeTensor) and not capturing():
        return
    rate, decay = _values([lr, weight_decay])
    k, m, n = param.shape
    by_row = m >= n
    squares = param.new_empty(second_moment_shape(param.shape), dtype=torch.float32)
    config = _tile("muon_update_", param)
    blocks = (cdiv(m, config["BLOCK_M"]), cdiv(n, config["BLOCK_N"]))
    launch(_squares_kernel, (blocks[0 if by_row else 1], k), update, squares, m, n, BY_ROW=by_row, **config)
    factor = _normuon_factor(squares, param.shape, second_moment, beta2, skip).contiguous()
    launch(_step_kernel, (*blocks, k), param, update, factor, skip, m, n, rate, rate * decay, BY_ROW=by_row, **config)


def _values(scalars: Sequence[Tensor]) -> list[float]:
    return [0.5 if scalar.is_meta else scalar.item() for scalar in scalars]  # of meta tensors: any


def _held(scalars: Sequence[Scalar]) -> list[Tensor]:
    """Scalars as an operator takes them. One that lies on a GPU is waited for."""
    return [
        (s if s.device.type == "cpu" else s.cpu()) if isinstance(s, Tensor) else torch.tensor(s, dtype=torch.float64)
        for s in scalars
    ]


# ---- the public functions


def _flag(skip: Tensor | None, like: Tensor) -> Tensor:
    """skip as an operator takes it."""
    return like.new_zeros((), dtype=torch.int32) if skip is None else skip


def adamw_apply_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factors: Sequence[Scalar],
    skip: Tensor | None = None,
) -> None:
    """adamw_ with what it multiplies with given, as `adamw_factors` has it: what is to be compiled.

    Under torch.compile factors are 0-d tensors on the CPU. Raises ValueError when shapes differ.
    """
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _fits("adamw_", name, tensor, param)
    if triton_runs("adamw_", param, param.numel()) and _contiguous("adamw_", param, exp_avg, exp_avg_sq):
        _adamw(param, grad.contiguous(), exp_avg, exp_avg_sq, _held(factors), _flag(skip, param))
        return
    _adamw_apply_reference_(param, grad, exp_avg, exp_avg_sq, factors, skip)


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
    skip: Tensor | None = None,
) -> None:
    """One AdamW step in place: changes param, exp_avg, exp_avg_sq, all of one shape and any floating dtype.

    step counts from 1. Decay comes first: param ← param·(1 − lr·weight_decay). Raises ValueError when shapes differ.
    """
    factors = adamw_factors(step, lr, beta1, beta2, eps, weight_decay)
    adamw_apply_(param, grad, exp_avg, exp_avg_sq, factors, skip)


def muon_momentum_(
    grad: Tensor, momentum_buffer: Tensor, momentum: Scalar, dtype: torch.dtype, skip: Tensor | None = None
) -> Tensor:
    """Updates momentum_buffer (K, m, n) in place; returns the Nesterov gradient with equal row norms, in `dtype`.

    Every row is scaled to ‖g‖_F/√m of its own matrix. Raises ValueError when shapes differ.
    """
    _stacked("muon_momentum_", "grad", grad)
    _fits("muon_momentum_", "momentum_buffer", momentum_buffer, grad)
    if triton_runs("muon_momentum_", grad, grad.size(-1)) and _contiguous("muon_momentum_", momentum_buffer):
        return _muon_momentum_triton(grad, momentum_buffer, momentum, dtype, skip)
    return muon_momentum_reference_(grad, momentum_buffer, momentum, dtype, skip)


def muon_update_(
    param: Tensor,
    update: Tensor,
    second_moment: Tensor,
    lr: Scalar,
    weight_decay: Scalar,
    beta2: Scalar,
    skip: Tensor | None = None,
) -> None:
    """Steps param (K, m, n) in place along `update`, the orthogonalised gradient of the same shape.

    second_moment is (K, m, 1) when m ≥ n, else (K, 1, n), changed in place. Decay applies only where update and param
    have the same sign. Raises ValueError when shapes do not fit.
    """
    _stacked("muon_update_", "param", param)
    _fits("muon_update_", "update", update, param)
    _fits("muon_update_", "second_moment", second_moment, param, second_moment_shape(param.shape))
    if triton_runs("muon_update_", param, param.size(-1)) and _contiguous("muon_update_", param):
        _muon_update_triton(param, update, second_moment, lr, weight_decay, beta2, skip)
        return
    muon_update_reference_(param, update, second_moment, lr, weight_decay, beta2, skip)


def _adamw_triton(
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
    skip: Tensor | None = None,
) -> None:
    factors = adamw_factors(step, lr, beta1, beta2, eps, weight_decay)
    _adamw(param, grad.contiguous(), exp_avg, exp_avg_sq, _held(factors), _flag(skip, param))


def _muon_momentum_triton(
    grad: Tensor, momentum_buffer: Tensor, momentum: Scalar, dtype: torch.dtype, skip: Tensor | None = None
) -> Tensor:
    grad = grad.contiguous()
    out = torch.empty_like(grad, dtype=dtype)
    _muon_momentum(grad, momentum_buffer, out, *_held([momentum]), _flag(skip, grad))
    return out


def _muon_update_triton(
    param: Tensor,
    update: Tensor,
    second_moment: Tensor,
    lr: Scalar,
    weight_decay: Scalar,
    beta2: Scalar,
    skip: Tensor | None = None,
) -> None:
    _muon_update(
        param, update.contiguous(), second_moment, *_held([lr, weight_decay]), float(beta2), _flag(skip, param)
    )


def _contiguous(op: str, *tensors: Tensor) -> bool:
    """Whether tensors that are changed in place are contiguous. Raises Refused if not, where Triton is forced."""
    found = all(tensor.is_contiguous() for tensor in tensors)
    if not found and mode(op) == "triton":
        raise Refused(f"{op}: Triton is asked for, but a tensor to be changed in place is not contiguous")
    return found


def second_moment_shape(shape: torch.Size) -> torch.Size:
    """Shape of NorMuon's second moment for a stack of matrices (K, m, n)."""
    k, m, n = shape
    return torch.Size((k, m, 1) if m >= n else (k, 1, n))


def _stacked(op: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError when a tensor is no stack of matrices."""
    if tensor.ndim != 3:
        raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, wanted a stack of matrices (K, m, n)")


def _fits(op: str, name: str, tensor: Tensor, like: Tensor, shape: torch.Size | None = None) -> None:
    """Raises ValueError when `tensor` is not where `like` is, or not of its shape (or the one given)."""
    wanted = like.shape if shape is None else shape
    if tensor.shape != wanted:
        raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, wanted {tuple(wanted)}")
    check_device(op, like, **{name: tensor})


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


def _narrow(case: Case, dtype: torch.dtype) -> torch.dtype:
    """What Muon's products are in: of a "mixed" case bfloat16 where weights are float32, as in a step."""
    return torch.bfloat16 if case.get("mixed") and dtype == torch.float32 else dtype


def _muon_momentum_inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    shape = (case["K"], case["m"], case["n"])
    return dict(
        grad=randn(shape, dtype, device, 0),
        momentum_buffer=randn(shape, dtype, device, 1),
        momentum=0.95,
        dtype=_narrow(case, dtype),
    )


def _muon_update_inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    shape = torch.Size((case["K"], case["m"], case["n"]))
    return dict(
        param=randn(shape, dtype, device, 0, scale=0.1),
        update=randn(shape, _narrow(case, dtype), device, 1),
        second_moment=randn(second_moment_shape(shape), dtype, device, 2).abs() / max(shape[1:]),  # as it will be
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


PROBED = 1 << 16  # elements of the largest parameter that a card is tried with


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
        triton=_adamw_triton,
        size=lambda case: case["N"],
        probe=lambda size: (dict(N=min(size, PROBED)),),
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
        triton=_muon_momentum_triton,
        size=lambda case: case["n"],
        probe=lambda size: (dict(K=2, m=33, n=size), dict(K=2, m=33, n=size, mixed=1)),
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
        triton=_muon_update_triton,
        size=lambda case: case["n"],
        # Tall ones sum by row, wide ones by column; matrices as wide as large models' are not tall as well.
        probe=lambda size: tuple(
            dict(sides, **mixed)
            for sides in (dict(K=2, m=33, n=size), *([dict(K=1, m=size + 1, n=size)] if size <= 2048 else []))
            for mixed in ({}, dict(mixed=1))
        ),
    )
)
