"""Decode attention in Triton: new queries over a KV cache, each row of its own length.

Few queries: a program owns a key/value head of a row, up to BLOCK_M of the queries that share it (all heads of the
group, all new tokens), and a stretch of the keys that they see: with one query there is nothing else to split, and a
long text would keep one program busy and the card idle ("flash decoding"). Each leaves a partial sum and its
log-sum-exp; a second kernel adds them up in a fixed order. Many queries (a prompt): flash attention's tiles, each row
standing at its own start. Keys out of sight, before the window or past the row's length, are never read.

What changes from request to request (T, S, splits) is not specialized: no length of a text compiles a kernel anew.

Source: Dao et al., Flash-Decoding (crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

import torch
from torch import Tensor

from .. import tuned
from ..triton_utils import INTERPRETED, cdiv, launch, operator, power_of_two, programs, tl, triton
from .triton_flash import LOG2E, _attend, _bounds, _config, _strides, _tile, positive

FEW = 64  # new tokens: for more there are enough programs without splitting the keys, and larger tiles read them less


@triton.jit(do_not_specialize=("T", "S", "splits"))
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, part_ptr, lse_ptr, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    T, S, window, factor, splits,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ONE: tl.constexpr, WINDOW: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (row and head, split, block of queries); query r of the group is token r // GROUP of head r % GROUP."""
    if ONE:
        T = 1  # folded: nearly all steps are such
    K: tl.constexpr = H // GROUP
    b = (tl.program_id(0) // K).to(tl.int64)
    g = tl.program_id(0) % K
    split = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    t, h = r // GROUP, g * GROUP + r % GROUP
    cols = tl.arange(0, BLOCK_D)
    factor = tl.cast(factor, tl.float32)
    begin = tl.load(start_ptr + b).to(tl.int32)
    inside = t < T
    at = ((b * T + t) * H + h)[:, None] * D + cols[None, :]
    q = tl.load(q_ptr + at, mask=inside[:, None] & (cols < D)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    earliest = (tl.program_id(2) * BLOCK_M) // GROUP
    latest = tl.minimum((tl.program_id(2) * BLOCK_M + BLOCK_M - 1) // GROUP, T - 1)
    first = tl.maximum(begin + earliest - window, 0) if WINDOW else 0
    last = tl.minimum(begin + latest + 1, S)
    share = tl.cdiv(tl.cdiv(last - first, splits), BLOCK_N) * BLOCK_N
    low = first + split * share
    high = tl.minimum(low + share, last)
    i = (begin + t)[:, None]
    y = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for key in range(low, high, BLOCK_N):
        j = key + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr + b * stride_kb + g.to(tl.int64) * stride_kh, j, stride_ks, D, BLOCK_D, high, UPCAST)
        v = _tile(v_ptr + b * stride_vb + g.to(tl.int64) * stride_vh, j, stride_vs, D, BLOCK_D, high, UPCAST)
        scores = tl.dot(q, k.trans(), input_precision="ieee") * factor
        seen = (j[None, :] <= i) & (j < high)[None, :]
        if WINDOW:
            seen = seen & (j[None, :] >= i - window)
        scores = tl.where(seen, scores, -1.0e30)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
        keep = tl.exp2(top - higher)
        y = tl.dot(p.to(v.dtype), v, y * keep[:, None], input_precision="ieee")
        total = total * keep + tl.sum(p, axis=1)
        top = higher
    some = total > 0
    y = y / tl.where(some, total, 1.0)[:, None]
    place = ((b * T + t) * H + h) * splits + split
    tl.store(part_ptr + place[:, None] * D + cols[None, :], y, mask=inside[:, None] & (cols < D)[None, :])
    tl.store(lse_ptr + place, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), -1.0e30), mask=inside)


@triton.jit(do_not_specialize=("splits",))
def _combine_kernel(part_ptr, lse_ptr, y_ptr, splits, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program owns one head of one query and adds up its splits, in order."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    top = tl.load(lse_ptr + row * splits)
    for split in range(1, splits):
        top = tl.maximum(top, tl.load(lse_ptr + row * splits + split))
    y = tl.zeros((BLOCK_D,), dtype=tl.float32)
    total = 0.0
    for split in range(0, splits):
        weight = tl.exp2(tl.load(lse_ptr + row * splits + split) - top)
        part = tl.load(part_ptr + (row * splits + split) * D + cols, mask=cols < D, other=0.0)
        y += weight * part
        total += weight
    tl.store(y_ptr + row * D + cols, y / total, mask=cols < D)


@triton.jit(do_not_specialize=("T", "S"))
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, y_ptr, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, T, S,
    window, factor, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns queries m0 … of head (b, h), as flash attention's; heavy (late) blocks start first."""
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    k_ptr += b * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + (h // GROUP).to(tl.int64) * stride_vh
    start = tl.load(start_ptr + b).to(tl.int32)
    keys = tl.minimum(start + T, S)  # what lies beyond is not this row's
    factor = tl.cast(factor, tl.float32)
    i = m0 + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + (b * T * H + h) * D, i, H * D, D, BLOCK_D, T, UPCAST)
    y = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first, full, edge, last = _bounds(m0, T, keys, start, window, True, WINDOW, BLOCK_M, BLOCK_N)
    if WINDOW:
        y, top, total = _attend(y, top, total, q, k_ptr, v_ptr, stride_ks, stride_vs, i, first, full, keys, start,
                                window, factor, D, True, WINDOW, True, UPCAST, BLOCK_N, BLOCK_D)  # fmt: skip
    y, top, total = _attend(y, top, total, q, k_ptr, v_ptr, stride_ks, stride_vs, i, full, edge, keys, start, window,
                            factor, D, True, WINDOW, False, UPCAST, BLOCK_N, BLOCK_D)  # fmt: skip
    y, top, total = _attend(y, top, total, q, k_ptr, v_ptr, stride_ks, stride_vs, i, edge, last, keys, start, window,
                            factor, D, True, WINDOW, True, UPCAST, BLOCK_N, BLOCK_D)  # fmt: skip
    y = y / tl.where(total == 0, 1.0, total)[:, None]  # 0 only past T
    cols = tl.arange(0, BLOCK_D)
    at = ((b * T + i) * H + h)[:, None] * D + cols[None, :]
    tl.store(y_ptr + at, y, mask=(i < T)[:, None] & (cols < D)[None, :])


def split_count(device: torch.device, blocks: int, keys: int, least: int) -> int:
    """Splits to cut the keys into: enough to fill the device, none shorter than `least` keys."""
    return max(1, min(cdiv(programs(device), max(blocks, 1)), keys // least))


@operator()
def _flash_attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, window: int | None, scale: float
) -> Tensor:
    """q is contiguous."""
    B, T, H, D = q.shape
    S, K = k_cache.size(1), k_cache.size(2)
    y = q.new_empty((B, T, H, D))
    inputs, strides = (q, k_cache, v_cache, start), _strides(k_cache, v_cache)
    if T > FEW:
        config = _config(q, "flash_attention")
        launch(
            _prefill_kernel, (B * H, cdiv(T, config["BLOCK_M"])), *inputs, y, *strides, T, S, window or 0,
            scale * LOG2E, H=H, GROUP=H // K, D=D, WINDOW=window is not None, **config,
        )  # fmt: skip
        return y
    config = tuned.config("flash_attention_decode", q.dtype, D, q.device)
    least = config.pop("least_keys")
    blocks = cdiv(T * (H // K), config["BLOCK_M"])
    splits = split_count(q.device, B * K * blocks, S if window is None else min(S, window + T), least)
    block_d = max(16, power_of_two(D))
    part = q.new_empty((B, T, H, splits, D), dtype=torch.float32)
    lse = q.new_empty((B, T, H, splits), dtype=torch.float32)
    launch(
        _decode_kernel, (B * K, splits, blocks), *inputs, part, lse, *strides, T, S, window or 0, scale * LOG2E, splits,
        H=H, GROUP=H // K, D=D, ONE=T == 1, WINDOW=window is not None, UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
        BLOCK_D=block_d, **config,
    )  # fmt: skip
    launch(_combine_kernel, (B * T * H,), part, lse, y, splits, D=D, BLOCK_D=block_d, num_warps=2)
    return y


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, window: int | None = None, scale: float | None = None
) -> Tensor:
    """flash_attention_decode by the kernels."""
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k_cache, v_cache))
    scale = (q.size(3) or 1) ** -0.5 if scale is None else scale
    q, scale = positive(q, scale)
    return _flash_attention_decode(q.contiguous(), k, v, start.contiguous(), window, scale)
