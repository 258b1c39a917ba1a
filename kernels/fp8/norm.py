"""The residual stream's norms with an fp8 copy of their result, straight and transposed, from the same pass.

    fp8_mix_rms_norm:  mixed  = a·(x + delta) + b·x0,  normed = rms_norm(mixed), and round(normed·448/√C)
    fp8_add_rms_norm:  summed = x + delta,             normed = rms_norm(summed), and the same

Its consumers are the products of attention or of the MLP. |normed| ≤ √C, whatever the input, so the scale is known
beforehand and no maximum is looked for. With U = rows · C · itemsize: reads 3U or 2U, writes 2U and 2 bytes an element;
rounding in a pass of its own would read normed again, and a maximum once more.

How the kernel is made: the transposed copy wants many rows at a time, the norm whole rows. So a program owns a block of
rows and walks over it twice, a few channels at a time: for the sum of squares, then, from cache, for the results.

When it does not pay: where the products are not in fp8. Source: rms_norm.py, quantize.py.
"""

import torch
from torch import Tensor

from .. import tuned
from ..dispatch import triton_runs
from ..registry import OPS, Op, as_rows, check_device, itemsize, register
from ..rms_norm import (
    CASES,
    _add_gradients,
    _mix_gradients,
    _save_mix,
    _save_sum,
    add_rms_norm_reference,
    check_mix,
    default_eps,
    mix_rms_norm_reference,
    same_shape_and_dtype,
)
from ..triton_utils import INTERPRETED, cdiv, launch, operator, tl, triton
from .quantize import E4M3, LARGEST, Fp8, Quantized, quantize_reference, store_both, to_fp8


def fp8_mix_rms_norm_reference(
    x: Tensor, x0: Tensor, a: Tensor, b: Tensor, delta: Tensor | None = None, index: int = 0
) -> tuple[Tensor, Quantized]:
    mixed, normed = mix_rms_norm_reference(x, x0, a, b, delta, index)
    return mixed, _quantized(normed)


def fp8_add_rms_norm_reference(x: Tensor, delta: Tensor) -> tuple[Tensor, Quantized]:
    summed, normed = add_rms_norm_reference(x, delta)
    return summed, _quantized(normed)


def _quantized(normed: Tensor) -> Quantized:
    return Quantized(normed, quantize_reference(as_rows(normed.detach()), _bound(normed), E4M3))


def _bound(x: Tensor) -> Tensor:
    """√C, the largest that a channel of a normed row can be."""
    return torch.full((), x.size(-1) ** 0.5, device=x.device)  # not math's: a width may be a symbol


# ---- Triton


@triton.jit
def _sum(x_ptr, delta_ptr, x0_ptr, a_ptr, b_ptr, index, at, mask, ADD: tl.constexpr, MIX: tl.constexpr):
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if MIX:
        x0 = tl.load(x0_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(a_ptr + index).to(tl.float32) * x + tl.load(b_ptr + index).to(tl.float32) * x0
    return x


@triton.jit(do_not_specialize=("index",))  # a layer's number: one kernel for all layers
def _fp8_norm_kernel(
    x_ptr, delta_ptr, x0_ptr, a_ptr, b_ptr, mixed_ptr, normed_ptr, values_ptr, transposed_ptr, N, C, index, eps, scale,
    ADD: tl.constexpr, MIX: tl.constexpr, LARGEST: tl.constexpr, EMULATE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows and walks over them twice, left to right, BLOCK_C channels at a time."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        at, mask = rows[:, None] * C + cols[None, :], (rows < N)[:, None] & (cols < C)[None, :]
        mixed = _sum(x_ptr, delta_ptr, x0_ptr, a_ptr, b_ptr, index, at, mask, ADD, MIX)
        tl.store(mixed_ptr + at, mixed, mask=mask)
        squares += tl.sum(mixed * mixed, axis=1)
    rstd = tl.rsqrt(squares / C + tl.cast(eps, tl.float32))[:, None]
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        at, mask = rows[:, None] * C + cols[None, :], (rows < N)[:, None] & (cols < C)[None, :]
        normed = _sum(x_ptr, delta_ptr, x0_ptr, a_ptr, b_ptr, index, at, mask, ADD, MIX) * rstd
        tl.store(normed_ptr + at, normed, mask=mask)
        values = to_fp8(normed, tl.cast(scale, tl.float32), LARGEST, EMULATE, values_ptr.dtype.element_ty)
        store_both(values, values_ptr + at, transposed_ptr + cols.to(tl.int64)[:, None] * N + rows[None, :], mask)


def _norm(
    x: Tensor, delta: Tensor | None, x0: Tensor, a: Tensor, b: Tensor, index: int, mix: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches: (mixed, normed, values, transposed) of (N, C)."""
    n, c = x.shape
    config = tuned.config("fp8_mix_rms_norm", x.dtype, c, x.device)
    mixed, normed = torch.empty_like(x), torch.empty_like(x)
    values, transposed = x.new_empty((n, c), dtype=E4M3), x.new_empty((c, n), dtype=E4M3)
    launch(
        _fp8_norm_kernel, (cdiv(n, config["BLOCK_N"]),), x, x if delta is None else delta, x0, a, b, mixed, normed,
        values, transposed, n, c, index, default_eps(x.dtype), LARGEST[E4M3] * (c or 1) ** -0.5, ADD=delta is not None,
        MIX=mix, LARGEST=LARGEST[E4M3], EMULATE=INTERPRETED, **config,
    )  # fmt: skip
    return mixed, normed, values, transposed


@operator()
def _fp8_mix_rms_norm(
    x: Tensor, x0: Tensor, a: Tensor, b: Tensor, delta: Tensor | None, index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _norm(x, delta, x0, a, b, index, mix=True)


@operator()
def _fp8_add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _norm(x, delta, x, x, x, 0, mix=False)


def _save_fp8_mix(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[2:])
    _save_mix(ctx, inputs, output)


def _save_fp8_sum(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[2:])
    _save_sum(ctx, inputs, output)


_fp8_mix_rms_norm.register_autograd(_mix_gradients, setup_context=_save_fp8_mix)
_fp8_add_rms_norm.register_autograd(_add_gradients, setup_context=_save_fp8_sum)


def _with_copies(x: Tensor, made: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Quantized]:
    mixed, normed, values, transposed = made
    fp8 = Fp8(values, transposed, _bound(x) / LARGEST[E4M3])
    return mixed.view(x.shape), Quantized(normed.view(x.shape), fp8)


def _fp8_mix_rms_norm_triton(
    x: Tensor, x0: Tensor, a: Tensor, b: Tensor, delta: Tensor | None = None, index: int = 0
) -> tuple[Tensor, Quantized]:
    delta = delta if delta is None else as_rows(delta)
    return _with_copies(x, _fp8_mix_rms_norm(as_rows(x), as_rows(x0), a.contiguous(), b.contiguous(), delta, index))


def _fp8_add_rms_norm_triton(x: Tensor, delta: Tensor) -> tuple[Tensor, Quantized]:
    return _with_copies(x, _fp8_add_rms_norm(as_rows(x), as_rows(delta)))


# ---- the public functions


def fp8_mix_rms_norm(
    x: Tensor, x0: Tensor, a: Tensor, b: Tensor, delta: Tensor | None = None, index: int = 0
) -> tuple[Tensor, Quantized]:
    """mix_rms_norm whose second result comes with its fp8 copies, for fp8_linear and fp8_mlp_relu2.

    Arguments as mix_rms_norm's, x in float32 or bfloat16. Raises ValueError when shapes or dtypes differ.
    """
    check_mix("fp8_mix_rms_norm", x, x0, a, b, delta, index)
    if triton_runs("fp8_mix_rms_norm", x, x.size(-1)):
        return _fp8_mix_rms_norm_triton(x, x0, a, b, delta, index)
    return fp8_mix_rms_norm_reference(x, x0, a, b, delta, index)


def fp8_add_rms_norm(x: Tensor, delta: Tensor) -> tuple[Tensor, Quantized]:
    """add_rms_norm whose second result comes with its fp8 copies, for fp8_linear and fp8_mlp_relu2.

    x, delta: (..., C) of one shape and dtype, float32 or bfloat16. Raises ValueError when shapes or dtypes differ.
    """
    same_shape_and_dtype("fp8_add_rms_norm", "delta", delta, x)
    check_device("fp8_add_rms_norm", x, delta=delta)
    if triton_runs("fp8_add_rms_norm", x, x.size(-1)):
        return _fp8_add_rms_norm_triton(x, delta)
    return fp8_add_rms_norm_reference(x, delta)


def _moved(rows: int):
    """So many rows of x's dtype, and two of fp8."""
    return lambda case, dtype: case["N"] * case["C"] * (rows * itemsize(dtype) + 2)


TOLERANCE = {torch.float32: 0.03, torch.bfloat16: 0.03}  # 3 mantissa bits

register(
    Op(
        name="fp8_mix_rms_norm",
        fn=fp8_mix_rms_norm,
        reference=fp8_mix_rms_norm_reference,
        inputs=OPS["mix_rms_norm"].inputs,
        cases=CASES,
        flops=lambda case: 9 * case["N"] * case["C"],
        bytes=_moved(5),
        tolerance=TOLERANCE,
        differentiable=("x", "x0", "a", "b", "delta"),
        triton=_fp8_mix_rms_norm_triton,
        size=lambda case: case["C"],
        probe=OPS["mix_rms_norm"].probe,
    )
)
register(
    Op(
        name="fp8_add_rms_norm",
        fn=fp8_add_rms_norm,
        reference=fp8_add_rms_norm_reference,
        inputs=OPS["add_rms_norm"].inputs,
        cases=CASES,
        flops=lambda case: 6 * case["N"] * case["C"],
        bytes=_moved(4),
        tolerance=TOLERANCE,
        differentiable=("x", "delta"),
        triton=_fp8_add_rms_norm_triton,
        size=lambda case: case["C"],
        probe=OPS["mix_rms_norm"].probe,
    )
)
