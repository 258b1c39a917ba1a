"""RMS norm, alone and fused with what stands before it in a transformer block.

    rms_norm(x)                = x / sqrt(mean(x², last dim) + eps) [· weight]
    mix_rms_norm(x, x0, a, b)  : mixed = a·(x [+ delta]) + b·x0,    normed = rms_norm(mixed)
    add_rms_norm(x, delta)     : summed = x + delta,                normed = rms_norm(summed)

All work on (..., C) and never mix rows, so they are bound by memory: about 4·C FLOPs for 2·C elements moved. With
U = rows · C · itemsize, as separate PyTorch calls mix_rms_norm moves 3U (x + delta), 2U (a·x), 2U (b·x0), 3U (sum), 2U
(norm); fused it reads x, delta and x0 and writes mixed and normed: 5U. Backward reads the gradients of both, and
makes mixed again from x, delta and x0, so that nobody keeps it; it writes the gradients of x (delta's is the same) and
x0: 7U. `torch.compile` finds the same fusions, but none with what stands before or behind an operator of ours: so the
residual add belongs into it. A hand-written kernel pays where the compiler's own is slow, or where nothing is compiled
(eager inference): on 8 GPUs nanochat's author saw no gain.

How the kernels are made: a program holds BLOCK_N whole rows in registers, so a row is read once. Backward computes the
statistics again from the row that it holds anyway, instead of saving them. It is persistent: each program walks over
many rows and adds up its own share of the gradients of weight, a and b, which are summed afterwards; no atomics, so
that the result is bitwise the same each time.

The epsilon is float32's machine epsilon for float32, bfloat16 and float16 alike, because the statistics are computed
in float32 (this is also what `torch.nn.functional.rms_norm` does); bfloat16's own epsilon would be 65,536 times larger.

Source: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467; the fusion as in Liger-Kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tuned
from .dispatch import triton_runs
from .registry import Case, Op, as_rows, check_device, itemsize, randn, register, wide
from .triton_utils import cdiv, launch, operator, power_of_two, programs, tl, triton

LARGEST_ROW = 16384  # elements that one program holds in registers


def default_eps(dtype: torch.dtype) -> float:
    """Machine epsilon of the dtype in which the statistics are computed: float64's own, else float32's 2⁻²³."""
    return torch.finfo(wide(dtype)).eps


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), weight, default_eps(x.dtype) if eps is None else eps)


def mix_rms_norm_reference(
    x: Tensor, x0: Tensor, a: Tensor, b: Tensor, delta: Tensor | None = None, index: int = 0
) -> tuple[Tensor, Tensor]:
    x = x if delta is None else x + delta
    mixed = a.reshape(-1)[index].to(x.dtype) * x + b.reshape(-1)[index].to(x.dtype) * x0
    return mixed, rms_norm_reference(mixed)


def add_rms_norm_reference(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + delta
    return summed, rms_norm_reference(summed)


# ---- Triton


@triton.jit(do_not_specialize=("index",))  # a layer's number: one kernel for all layers
def _rms_norm_fwd_kernel(
    x_ptr, delta_ptr, x0_ptr, a_ptr, b_ptr, weight_ptr, mixed_ptr, normed_ptr, N, index, eps,
    C: tl.constexpr, ADD: tl.constexpr, MIX: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N consecutive rows and reads them once, left to right. ADD: x is x + delta."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    at = rows[:, None] * C + cols[None, :]
    mask = (rows < N)[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if MIX:
        x0 = tl.load(x0_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(a_ptr + index).to(tl.float32) * x + tl.load(b_ptr + index).to(tl.float32) * x0
    if ADD or MIX:
        tl.store(mixed_ptr + at, x, mask=mask)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / C + tl.cast(eps, tl.float32))  # (BLOCK_N,)
    y = x * rstd[:, None]
    if WEIGHT:
        y = y * tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    tl.store(normed_ptr + at, y, mask=mask)


@triton.jit(do_not_specialize=("index",))  # a layer's number: one kernel for all layers
def _rms_norm_bwd_kernel(
    dmixed_ptr, dnormed_ptr, x_ptr, delta_ptr, x0_ptr, a_ptr, b_ptr, weight_ptr,
    dx_ptr, dx0_ptr, dweight_ptr, da_ptr, db_ptr, N, index, eps,
    C: tl.constexpr, ADD: tl.constexpr, SUM: tl.constexpr, MIX: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program p owns row blocks p, p + P, p + 2P … and one row of each partial sum.

    ADD: x is x + delta. SUM: x is the sum already, which has a gradient of its own besides the norm's, as MIX has.
    """
    cols = tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_C,), dtype=tl.float32)
    da = tl.zeros((BLOCK_N,), dtype=tl.float32)
    db = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if MIX:
        a = tl.load(a_ptr + index).to(tl.float32)
        b = tl.load(b_ptr + index).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        at = rows[:, None] * C + cols[None, :]
        mask = (rows < N)[:, None] & (cols < C)[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            x += tl.load(delta_ptr + at, mask=mask, other=0.0).to(tl.float32)
        m = x
        if MIX:
            x0 = tl.load(x0_ptr + at, mask=mask, other=0.0).to(tl.float32)
            m = a * x + b * x0
        dy = tl.load(dnormed_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(m * m, axis=1) / C + tl.cast(eps, tl.float32))[:, None]
        unit = m * rstd
        if WEIGHT:
            dweight += tl.sum(dy * unit, axis=0)
            dy = dy * weight
        dm = rstd * (dy - unit * (tl.sum(dy * unit, axis=1) / C)[:, None])
        if SUM or MIX:
            dm += tl.load(dmixed_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if MIX:  # subtracted, and negated at the end: Triton 3.9's LLVM crashes for RDNA on a += of row sums in a loop
            da -= tl.sum(dm * x, axis=1)
            db -= tl.sum(dm * x0, axis=1)
            tl.store(dx0_ptr + at, b * dm, mask=mask)
            dm = a * dm
        tl.store(dx_ptr + at, dm, mask=mask)
    if WEIGHT:
        tl.store(dweight_ptr + tl.program_id(0) * C + cols, dweight, mask=cols < C)
    if MIX:
        tl.store(da_ptr + tl.program_id(0), -tl.sum(da))
        tl.store(db_ptr + tl.program_id(0), -tl.sum(db))


def _blocks(op: str, x: Tensor, backward: bool) -> dict[str, int]:
    config = tuned.config(op, x.dtype, x.size(-1), x.device)
    elements = config.pop("backward_elements" if backward else "elements")
    config.pop("elements" if backward else "backward_elements")
    block_c = power_of_two(x.size(-1))
    return dict(config, BLOCK_N=max(1, elements // block_c), BLOCK_C=block_c)


@operator()
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = torch.empty_like(x)
    n, c = x.shape
    config = _blocks("rms_norm", x, backward=False)
    flags = dict(C=c, ADD=False, MIX=False, WEIGHT=weight is not None)
    launch(
        _rms_norm_fwd_kernel, (cdiv(n, config["BLOCK_N"]),), x, x, x, x, x, x if weight is None else weight, x, normed,
        n, 0, eps, **flags, **config,
    )  # fmt: skip
    return normed


@operator()
def _rms_norm_backward(dnormed: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """dx, and a row of weight's gradient from each program, (P, C); (P, 0) without a weight.

    P is the device's, or N, whatever the blocks are (programs that have none leave zeros): Inductor's cache on disk
    does not know of block sizes, so that no shape in a compiled graph may be theirs.
    """
    n, c = x.shape
    config = _blocks("rms_norm", x, backward=True)
    grid = min(n, programs(x.device))
    dx = torch.empty_like(x)
    dweight = x.new_empty((grid, c if weight is not None else 0), dtype=torch.float32)
    flags = dict(C=c, ADD=False, SUM=False, MIX=False, WEIGHT=weight is not None)
    launch(
        _rms_norm_bwd_kernel, (grid,), x, dnormed, x, x, x, x, x, x if weight is None else weight, dx, x, dweight, x, x,
        n, 0, eps, **flags, **config,
    )  # fmt: skip
    return dx, dweight


@operator()
def _add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    n, c = x.shape
    config = _blocks("add_rms_norm", x, backward=False)
    summed, normed = torch.empty_like(x), torch.empty_like(x)
    launch(
        _rms_norm_fwd_kernel, (cdiv(n, config["BLOCK_N"]),), x, delta, x, x, x, x, summed, normed, n, 0,
        default_eps(x.dtype), C=c, ADD=True, MIX=False, WEIGHT=False, **config,
    )  # fmt: skip
    return summed, normed


@operator()
def _add_rms_norm_backward(dsummed: Tensor, dnormed: Tensor, summed: Tensor) -> Tensor:
    """The gradient of both terms."""
    n, c = summed.shape
    config = _blocks("add_rms_norm", summed, backward=True)
    dx = torch.empty_like(summed)
    launch(
        _rms_norm_bwd_kernel, (min(cdiv(n, config["BLOCK_N"]), programs(summed.device)),), dsummed, dnormed, summed,
        summed, summed, summed, summed, summed, dx, dx, dx, dx, dx, n, 0, default_eps(summed.dtype), C=c, ADD=False,
        SUM=True, MIX=False, WEIGHT=False, **config,
    )  # fmt: skip
    return dx


@operator()
def _mix_rms_norm(
    x: Tensor, x0: Tensor, a: Tensor, b: Tensor, delta: Tensor | None, index: int
) -> tuple[Tensor, Tensor]:
    n, c = x.shape
    config = _blocks("mix_rms_norm", x, backward=False)
    mixed, normed = torch.empty_like(x), torch.empty_like(x)
    launch(
        _rms_norm_fwd_kernel, (cdiv(n, config["BLOCK_N"]),), x, x if delta is None else delta, x0, a, b, x, mixed,
        normed, n, index, default_eps(x.dtype), C=c, ADD=delta is not None, MIX=True, WEIGHT=False, **config,
    )  # fmt: skip
    return mixed, normed


@operator()
def _mix_rms_norm_backward(
    dmixed: Tensor, dnormed: Tensor, x: Tensor, x0: Tensor, a: Tensor, b: Tensor, delta: Tensor | None, index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dx0, and those of a and b from each program, (2, P), P as in _rms_norm_backward."""
    n, c = x.shape
    config = _blocks("mix_rms_norm", x, backward=True)
    grid = min(n, programs(x.device)) if c else 0  # a mean over no channels is NaN
    dx, dx0 = torch.empty_like(x), torch.empty_like(x)
    sums = x.new_empty((2, grid), dtype=torch.float32)
    launch(
        _rms_norm_bwd_kernel, (grid,), dmixed, dnormed, x, x if delta is None else delta, x0, a, b, x, dx, dx0, x,
        sums[0], sums[1], n, index, default_eps(x.dtype), C=c, ADD=delta is not None, SUM=False, MIX=True, WEIGHT=False,
        **config,
    )  # fmt: skip
    return dx, dx0, sums


def _save_rms_norm(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_gradients(ctx, dnormed):
    x, weight = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(dnormed.contiguous(), x, weight, ctx.eps)
    return dx, None if weight is None else dweight.sum(0).to(weight.dtype), None


def _save_sum(ctx, inputs, output):
    ctx.save_for_backward(output[0])


def _add_gradients(ctx, dsummed, dnormed, *_):
    dx = _add_rms_norm_backward(dsummed.contiguous(), dnormed.contiguous(), *ctx.saved_tensors)
    return dx, dx


def _save_mix(ctx, inputs, output):
    *tensors, ctx.index = inputs
    ctx.save_for_backward(*tensors)


def _mix_gradients(ctx, dmixed, dnormed, *_):
    x, x0, a, b, delta = ctx.saved_tensors
    dx, dx0, sums = _mix_rms_norm_backward(dmixed.contiguous(), dnormed.contiguous(), x, x0, a, b, delta, ctx.index)
    da, db = sums.sum(1)
    return dx, dx0, _placed(da, a, ctx.index), _placed(db, b, ctx.index), None if delta is None else dx, None


def _placed(value: Tensor, like: Tensor, index: int) -> Tensor:
    """`value` () at `index`, zeros elsewhere."""
    at = torch.arange(like.numel(), device=like.device).view(like.shape)
    return torch.where(at == index, value, 0).to(like.dtype)


_rms_norm.register_autograd(_rms_norm_gradients, setup_context=_save_rms_norm)
_add_rms_norm.register_autograd(_add_gradients, setup_context=_save_sum)
_mix_rms_norm.register_autograd(_mix_gradients, setup_context=_save_mix)


def _rms_norm_triton(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    weight = weight if weight is None else weight.contiguous()
    return _rms_norm(as_rows(x), weight, default_eps(x.dtype) if eps is None else eps).view(x.shape)


def _mix_rms_norm_triton(
    x: Tensor, x0: Tensor, a: Tensor, b: Tensor, delta: Tensor | None = None, index: int = 0
) -> tuple[Tensor, Tensor]:
    delta = delta if delta is None else as_rows(delta)
    mixed, normed = _mix_rms_norm(as_rows(x), as_rows(x0), a.contiguous(), b.contiguous(), delta, index)
    return mixed.view(x.shape), normed.view(x.shape)


def _add_rms_norm_triton(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    summed, normed = _add_rms_norm(as_rows(x), as_rows(delta))
    return summed.view(x.shape), normed.view(x.shape)


# ---- the public functions


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x / rms(x) over the last dimension.

    x: (..., C), any floating dtype; weight: (C,) or None; eps: None for the default above. Returns (..., C) in x's
    dtype. Raises ValueError when weight is not (C,).
    """
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"rms_norm: x is {x.dtype} {tuple(x.shape)}, wanted a floating dtype and (..., C)")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight is {tuple(weight.shape)} but x has C={x.size(-1)}, so it must be (C,)")
    if weight is not None:
        check_device("rms_norm", x, weight=weight)
    if triton_runs("rms_norm", x, x.size(-1), LARGEST_ROW):
        return _rms_norm_triton(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def mix_rms_norm(
    x: Tensor, x0: Tensor, a: Tensor, b: Tensor, delta: Tensor | None = None, index: int = 0
) -> tuple[Tensor, Tensor]:
    """(mixed, normed) with mixed = a[index]·(x + delta) + b[index]·x0 and normed = rms_norm(mixed).

    x, x0, delta (or None): (..., C) of one shape and dtype; a, b: an element for each index (a layer's), gradients flow
    to both. A view `a[index]` would do, but its odd address costs the compiler the wide loads of all that follows. Both
    results are (..., C) in x's dtype. Raises ValueError when shapes or dtypes differ, or without such an element.
    """
    check_mix("mix_rms_norm", x, x0, a, b, delta, index)
    if triton_runs("mix_rms_norm", x, x.size(-1), LARGEST_ROW):
        return _mix_rms_norm_triton(x, x0, a, b, delta, index)
    return mix_rms_norm_reference(x, x0, a, b, delta, index)


def add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(summed, normed) with summed = x + delta and normed = rms_norm(summed).

    x, delta: (..., C) of one shape and dtype. Raises ValueError when shapes or dtypes differ.
    """
    same_shape_and_dtype("add_rms_norm", "delta", delta, x)
    check_device("add_rms_norm", x, delta=delta)
    if triton_runs("add_rms_norm", x, x.size(-1), LARGEST_ROW):
        return _add_rms_norm_triton(x, delta)
    return add_rms_norm_reference(x, delta)


def check_mix(op: str, x: Tensor, x0: Tensor, a: Tensor, b: Tensor, delta: Tensor | None, index: int) -> None:
    """Raises ValueError naming the first argument that does not fit x, or that has no element at index."""
    same_shape_and_dtype(op, "x0", x0, x)
    check_device(op, x, x0=x0, a=a, b=b)
    if delta is not None:
        same_shape_and_dtype(op, "delta", delta, x)
        check_device(op, x, delta=delta)
    for name, scalars in dict(a=a, b=b).items():
        if not 0 <= index < scalars.numel():
            raise ValueError(f"{op}: {name} has {scalars.numel()} elements, none at index {index}")


def same_shape_and_dtype(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
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


def _probe(size: int) -> tuple[Case, ...]:
    return (dict(N=37, C=size),)


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
        triton=_rms_norm_triton,
        size=lambda case: case["C"],
        probe=_probe,
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
            a=torch.tensor([1.2, 1.1, 1.0], device=device),
            b=torch.tensor([0.1, 0.2, 0.3], device=device),
            delta=_x(case, dtype, device, 2),
            index=1,
        ),
        cases=CASES,
        flops=lambda case: 8 * case["N"] * case["C"],
        bytes=_moved(5),
        differentiable=("x", "x0", "a", "b", "delta"),
        triton=_mix_rms_norm_triton,
        size=lambda case: case["C"],
        probe=_probe,
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
        triton=_add_rms_norm_triton,
        size=lambda case: case["C"],
        probe=_probe,
    )
)
