"""Rounding a tensor to fp8 under one scale, with the transposed copy that backward needs, in one pass.

    values = round(f(x)·scale),    scale = largest / amax,    f(x)·1 ≈ values·inverse,    inverse = amax / largest

e4m3 (3 mantissa bits, up to 448) for what goes forward, e5m2 (2 bits, up to 57,344) for gradients. fp8 matrix units
want both factors with the summed dimension contiguous: forward sums over channels, a weight's gradient over tokens, so
each tensor is needed both ways. One call reads x once and writes 1 + 1 bytes an element; as separate passes (maximum,
scale and round, transpose) it is three reads and two writes: 45–50 ms of a 300 ms step at d24.

f is the identity, or what stands between two products and would be a pass of its own: relu(x)² or its gradient. What
amax is:

* `bound`: known without looking. |x / rms(x)| ≤ √C, so norms hand out fp8 copies from their own epilogue
  (rms_norm.py), and a loss's gradient is at most the incoming one. That costs no precision: in floating point a scale
  moves only the end where numbers underflow.
* current: the maximum of this tensor, a pass that reads and writes nothing.
* delayed (`history`): the largest of the last 16 calls. No extra pass: the maximum for the next calls comes out of
  this one. What exceeds it saturates.

NaN and infinity come out as NaN: a loss that is NaN must not turn into a number.

Source: Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433; delayed scaling as in NVIDIA's Transformer
Engine; tensorwise current scaling as in torchao and nanochat.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import tuned
from ..constant import constant
from ..triton_utils import INTERPRETED, cdiv, launch, operator, programs, tl, triton

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
FP8_ROW = 16  # matrix units want rows of a multiple of it, that begin at one
HISTORY = 16  # maxima that delayed scaling remembers
PLAIN, RELU2, RELU2_BACKWARD = 0, 1, 2  # f(x): x; relu(x)²; 2·relu(h)·x


class Fp8(NamedTuple):
    """A matrix in fp8: values (N, C), its transpose (C, N), and the number both are to be multiplied by."""

    values: Tensor
    transposed: Tensor
    inverse: Tensor  # () float32


class Quantized(NamedTuple):
    """An activation x (..., C) together with its fp8 form, in which (...) is flattened to N."""

    x: Tensor
    fp8: Fp8


def plain(x: "Tensor | Quantized") -> Tensor:
    """The tensor itself."""
    return x.x if isinstance(x, Quantized) else x


def quantize_reference(x: Tensor, amax: Tensor, dtype: torch.dtype, kind: int = PLAIN, h: Tensor | None = None) -> Fp8:
    """f(x) (N, C) in fp8, scaled so that amax () is the largest number of `dtype`; h (N, C) for RELU2_BACKWARD."""
    y, largest = _applied(x, kind, h), LARGEST[dtype]
    amax = amax.clamp_min(1e-12)
    scaled = (y * (largest / amax)).clamp(-largest, largest) + (y - y)  # y − y: 0, but NaN for NaN and infinity
    values = scaled.to(dtype)
    return Fp8(values, values.t().contiguous(), amax / largest)


def _applied(x: Tensor, kind: int, h: Tensor | None) -> Tensor:
    x = x.float()
    if kind == RELU2:
        return F.relu(x).square()
    return x if h is None else 2 * F.relu(h.float()) * x


# ---- Triton


@triton.jit
def _function(x_ptr, h_ptr, at, mask, KIND: tl.constexpr):
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if KIND == 1:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = x * x
    if KIND == 2:
        h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = 2.0 * tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL) * x
    return x


@triton.jit
def to_fp8(y, scale, LARGEST: tl.constexpr, EMULATE: tl.constexpr, dtype: tl.constexpr):
    """round(y·scale), saturated; NaN for NaN and infinity."""
    scaled = tl.minimum(tl.maximum(y * scale, -LARGEST), LARGEST) + (y - y)
    if EMULATE:  # the interpreter's cast truncates: round to a multiple of the last place first, ties to even
        bits: tl.constexpr = 3 if LARGEST == 448.0 else 2
        least: tl.constexpr = 127 - 6 if LARGEST == 448.0 else 127 - 14  # below this exponent numbers are evenly spaced
        exponent = tl.maximum((scaled.to(tl.int32, bitcast=True) >> 23) & 255, least)
        magic = ((exponent + 23 - bits) << 23).to(tl.float32, bitcast=True) * 1.5
        scaled = (scaled + magic) - magic
    return scaled.to(dtype)


@triton.jit
def store_both(values, to, across, mask):
    """Writes a tile of fp8 values, and its transpose from what was written, which lies in the cache.

    That reads 1 byte an element more, from the cache. Transposed out of registers it came out wrong on an H100: the
    ptxas that Triton brings for it (12.8 and 12.9) mixes bytes up (triton-lang/triton issue 11111).
    """
    tl.store(to, values, mask=mask)
    tl.debug_barrier()
    tl.store(across, tl.load(to, mask=mask, other=0.0).trans(), mask=mask.trans())


@triton.jit
def _amax_kernel(x_ptr, h_ptr, amax_ptr, total, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Program p takes blocks p, p + P, p + 2P … of the flat tensor and leaves its largest |f(x)| in amax[p]."""
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(total, BLOCK), tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        y = tl.abs(_function(x_ptr, h_ptr, at, at < total, KIND))
        largest = tl.maximum(largest, y, propagate_nan=tl.PropagateNan.ALL)
    found = tl.max(largest) + tl.sum(largest - largest)  # a reduction's maximum drops NaN, a sum does not
    tl.store(amax_ptr + tl.program_id(0), found)


@triton.jit
def _quantize_kernel(
    x_ptr, h_ptr, amax_ptr, values_ptr, transposed_ptr, seen_ptr, N, C,
    KIND: tl.constexpr, LARGEST: tl.constexpr, EMULATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program owns a tile: reads its rows, writes its rows, then its columns, and its largest |f(x)|."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < N)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    y = _function(x_ptr, h_ptr, at, mask, KIND)
    amax = tl.maximum(tl.load(amax_ptr), 1e-12, propagate_nan=tl.PropagateNan.ALL)
    values = to_fp8(y, tl.div_rn(tl.cast(LARGEST, tl.float32), amax), LARGEST, EMULATE, values_ptr.dtype.element_ty)
    store_both(values, values_ptr + at, transposed_ptr + cols[:, None] * N + rows[None, :], mask)
    largest = tl.max(tl.max(tl.abs(y), axis=1), axis=0)
    tl.store(seen_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), largest)


@operator()
def _fp8_amax(x: Tensor, h: Tensor | None, kind: int) -> Tensor:
    """() float32: the largest |f(x)|; 0 for an empty x."""
    config = tuned.config("fp8_amax_backward", x.dtype, x.size(-1), x.device)
    grid = max(1, min(cdiv(x.numel(), config["BLOCK"]), programs(x.device)))
    amax = x.new_zeros((grid,), dtype=torch.float32)
    launch(_amax_kernel, (grid,), x, x if h is None else h, amax, x.numel(), KIND=kind, **config)
    return amax.amax()


@operator()
def _fp8_quantize(
    x: Tensor, h: Tensor | None, amax: Tensor, kind: int, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, transposed, largest |f(x)| seen) of x (N, C), all contiguous; e5m2 if gradient, else e4m3."""
    (n, c), dtype = x.shape, E5M2 if gradient else E4M3
    config = tuned.config("fp8_linear", x.dtype, c, x.device)
    values, transposed = x.new_empty((n, c), dtype=dtype), x.new_empty((c, n), dtype=dtype)
    grid = (cdiv(n, config["BLOCK_N"]), cdiv(c, config["BLOCK_C"]))
    seen = x.new_zeros((grid[0] * grid[1] or 1,), dtype=torch.float32)
    launch(
        _quantize_kernel, grid, x, x if h is None else h, amax, values, transposed, seen, n, c, KIND=kind,
        LARGEST=LARGEST[dtype], EMULATE=INTERPRETED, **config,
    )  # fmt: skip
    return values, transposed, seen.amax()


@operator(mutates=["history"])
def _fp8_note(history: Tensor, row: int, amax: Tensor) -> None:
    """Puts amax () first in a row of history (R, HISTORY) and drops the oldest; NaN is not noted."""
    if history.is_meta:
        return
    known = torch.where(amax.isfinite(), amax, history[row, 0])
    history[row] = torch.cat((known[None], history[row, :-1]))


# ---- either way


def new_history(rows: int, device: torch.device | str | None = None) -> Tensor:
    """(rows, HISTORY) float32 for delayed scaling, before anything was seen: as if all maxima had been 1."""
    return torch.ones((rows, HISTORY), device=device)


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    fused: bool,
    kind: int = PLAIN,
    h: Tensor | None = None,
    bound: Tensor | None = None,
    history: Tensor | None = None,
    row: int = 0,
) -> Fp8:
    """f(x) in fp8 for x (N, C), by the kernels if `fused`; amax from bound (), or history's row, or x itself."""
    if bound is not None:
        amax = bound
    elif history is not None:
        amax = history[row].amax()
    else:
        amax = _fp8_amax(x, h, kind) if fused else _largest(x, kind, h)
    if fused:
        values, transposed, seen = _fp8_quantize(x, h, amax, kind, dtype == E5M2)
        made = Fp8(values, transposed, amax.clamp_min(1e-12) / LARGEST[dtype])
    else:
        made = quantize_reference(x, amax, dtype, kind, h)
        seen = amax if history is None else _largest(x, kind, h)
    if history is not None:
        _fp8_note(history, row, seen)
    return made


def quantized_input(x: Tensor, made: tuple[Tensor | None, ...], fused: bool, history: Tensor | None) -> Fp8:
    """An activation in e4m3: as its producer made it (the parts of an Fp8), or rounded now, with history's row 0."""
    return quantize(x, E4M3, fused, history=history, row=0) if made[0] is None else Fp8(*made)  # type: ignore[arg-type]


def _largest(x: Tensor, kind: int, h: Tensor | None) -> Tensor:
    return _applied(x, kind, h).abs().amax() if x.numel() else torch.zeros((), device=x.device)


def product(a: Tensor, b: Tensor, inverse: Tensor, dtype: torch.dtype, exact: bool = False) -> Tensor:
    """a·bᵀ·inverse for fp8 a (M, R) and b (N, R), summed in float32, in `dtype`.

    On matrix units where the card has them for fp8 (exact: with all sums kept in float32, as gradients want them; else
    in the units' own, shorter sums); anywhere else the same sums in float32, slowly.
    """
    some = a.numel() and b.numel()  # of nothing, strides are as they may be, and those units want them their way
    if some and _has_units(a) and a.size(1) % FP8_ROW == 0 and b.size(0) % FP8_ROW == 0 and dtype != torch.float64:
        one = torch.ones((), device=a.device)
        return torch._scaled_mm(a, b.t(), scale_a=inverse, scale_b=one, out_dtype=dtype, use_fast_accum=not exact)
    made = (a.float() @ b.float().t()) * inverse
    return made if made.dtype == dtype else made.to(dtype)  # a `to` that does nothing costs torch 2.11 the gradient


def _has_units(a: Tensor) -> bool:
    return a.is_cuda and has_units(a.device.index or 0)


@constant
def has_units(index: int) -> bool:
    """Whether a card multiplies these formats of fp8: Ada (8.9), Hopper and newer; of AMD's none is asked."""
    return not torch.version.hip and torch.cuda.get_device_capability(index) >= (8, 9)
