"""Flash attention in Triton: forward, backward, causal, sliding windows, grouped heads, any lengths.

A program owns BLOCK_M queries of one head (forward, dq) or BLOCK_N keys of one key/value head (dk, dv) and walks over
the tiles of the other side that it can see, no others: for a window of W keys that is about W/BLOCK_N + 2 tiles however
long the text is. Only the tiles on the two edges of the band need a mask. The scores never reach memory: forward keeps
a running maximum and sum per query (the online softmax), and stores their log-sum-exp, from which backward makes the
probabilities again. dk and dv walk over all query heads of their group, so every sum has one owner: no atomics, the
same bits each time. That costs two of seven matrix products more than FlashAttention's one-pass backward with atomics.

Positions: query i stands at key position i + (S − T), the last query with the last key ("bottom-right"); a window w
lets it see w keys before its own. A query that sees nothing gets 0.

Source: Dao, FlashAttention-2, arXiv:2307.08691; Tillet's Triton tutorial on fused attention for the order of the loops.
"""

import torch
from torch import Tensor

from .. import tuned
from ..triton_utils import INTERPRETED, cdiv, launch, operator, power_of_two, tl, triton

LOG2E = 1.4426950408889634
LARGEST_HEAD = 256
LEAST = 1e-36  # of a scale; smaller ones are 0 in float32 once they are multiplied


@triton.jit
def _tile(ptr, rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, limit, UPCAST: tl.constexpr):
    """(rows, BLOCK_D) of a head; zeros past limit and D. The interpreter multiplies bfloat16 wrongly: upcast."""
    cols = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    x = tl.load(ptr + at, mask=((rows >= 0) & (rows < limit))[:, None] & (cols < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _visible(i, j, S, shift, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which queries i (M, 1) see which keys j (1, N)."""
    seen = j < S
    if CAUSAL:
        seen = seen & (j <= i + shift)
    if WINDOW:
        seen = seen & (j >= i + shift - window)
    return seen


@triton.jit
def _attend(
    y, top, total, q, k_ptr, v_ptr, stride_k, stride_v, i, first, last, S, shift, window, factor,
    D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Key tiles from `first` to before `last` (multiples of BLOCK_N) for one block of queries."""
    for start in range(first, last, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr, j, stride_k, D, BLOCK_D, S, UPCAST)
        scores = tl.dot(q, k.trans(), input_precision="ieee")  # (M, N)
        if MASKED:
            visible = _visible(i[:, None], j[None, :], S, shift, window, CAUSAL, WINDOW)
            scores = tl.where(visible, scores, float("-inf"))  # p is 0 there: top is finite from the beginning
        higher = tl.maximum(top, tl.max(scores, axis=1) * factor)  # factor > 0: the largest stays the largest
        p = tl.exp2(scores * factor - higher[:, None])  # one FMA an element
        keep = tl.exp2(top - higher)
        v = _tile(v_ptr, j, stride_v, D, BLOCK_D, S, UPCAST)
        y = tl.dot(p.to(v.dtype), v, y * keep[:, None], input_precision="ieee")
        total = total * keep + tl.sum(p, axis=1)
        top = higher
    return y, top, total


@triton.jit
def _bounds(m0, T, S, shift, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr):  # fmt: skip
    """For queries m0 …: key tiles in sight [first, last), and those seen by all of them [full, edge), of multiples."""
    m1 = tl.minimum(m0 + BLOCK_M, T)
    first, full = 0, 0
    last = tl.cdiv(S, BLOCK_N) * BLOCK_N
    edge = S // BLOCK_N * BLOCK_N
    if CAUSAL:
        last = tl.minimum(last, tl.cdiv(tl.maximum(m1 + shift, 0), BLOCK_N) * BLOCK_N)
        edge = tl.minimum(edge, tl.maximum(m0 + shift + 1, 0) // BLOCK_N * BLOCK_N)
    if WINDOW:
        first = tl.maximum(m0 + shift - window, 0) // BLOCK_N * BLOCK_N
        full = tl.cdiv(tl.maximum(m1 - 1 + shift - window, 0), BLOCK_N) * BLOCK_N
    first = tl.minimum(first, last)
    full = tl.minimum(tl.maximum(full, first), last)
    edge = tl.minimum(tl.maximum(edge, full), last)
    return first, full, edge, last


@triton.jit
def _place(T, BLOCK_M: tl.constexpr):
    """(head of all, first query) of this program: one head's blocks side by side, so that those at work share its keys
    and values in L2, and of these the heavy (late) ones first."""
    blocks = tl.cdiv(T, BLOCK_M)
    return tl.program_id(0) // blocks, (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, T, S, window, factor,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns queries m0 … of head (b, h)."""
    head, m0 = _place(T, BLOCK_M)
    b, h = (head // H).to(tl.int64), head % H
    q_ptr += b * stride_qb + h.to(tl.int64) * stride_qh
    k_ptr += b * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + (h // GROUP).to(tl.int64) * stride_vh
    shift = S - T
    factor = tl.cast(factor, tl.float32)
    i = m0 + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr, i, stride_qt, D, BLOCK_D, T, UPCAST)
    y = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first, full, edge, last = _bounds(m0, T, S, shift, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if WINDOW:
        y, top, total = _attend(y, top, total, q, k_ptr, v_ptr, stride_ks, stride_vs, i, first, full, S, shift, window,
                                factor, D, CAUSAL, WINDOW, True, UPCAST, BLOCK_N, BLOCK_D)  # fmt: skip
    y, top, total = _attend(y, top, total, q, k_ptr, v_ptr, stride_ks, stride_vs, i, full, edge, S, shift, window,
                            factor, D, CAUSAL, WINDOW, False, UPCAST, BLOCK_N, BLOCK_D)  # fmt: skip
    y, top, total = _attend(y, top, total, q, k_ptr, v_ptr, stride_ks, stride_vs, i, edge, last, S, shift, window,
                            factor, D, CAUSAL, WINDOW, True, UPCAST, BLOCK_N, BLOCK_D)  # fmt: skip
    blind = total == 0  # not so where total is NaN, which must stay
    y = tl.where(blind[:, None], 0.0, y / tl.where(blind, 1.0, total)[:, None])
    lse = tl.where(blind, 1.0e30, top + tl.log2(tl.where(blind, 1.0, total)))  # exp2(score − 1e30) is 0
    cols = tl.arange(0, BLOCK_D)
    at = ((b * T + i) * H + h)[:, None] * D + cols[None, :]
    tl.store(y_ptr + at, y, mask=(i < T)[:, None] & (cols < D)[None, :])
    tl.store(lse_ptr + head.to(tl.int64) * T + i, lse, mask=i < T)


@triton.jit
def _delta_kernel(y_ptr, dy_ptr, delta_ptr, N, T, H: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_D: tl.constexpr):  # fmt: skip
    """delta = Σ y·dy over a head, (B, H, T); a program owns BLOCK_N of the N = B·T·H heads."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    at = rows.to(tl.int64)[:, None] * D + cols[None, :]
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    token, h = rows // H, rows % H
    place = ((token // T).to(tl.int64) * H + h) * T + token % T
    tl.store(delta_ptr + place, tl.sum(y * dy, axis=1), mask=rows < N)


@triton.jit
def _dq_tiles(
    dq, q, dy, lse, delta, k_ptr, v_ptr, stride_k, stride_v, i, first, last, S, shift, window, factor,
    D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for start in range(first, last, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr, j, stride_k, D, BLOCK_D, S, UPCAST)
        v = _tile(v_ptr, j, stride_v, D, BLOCK_D, S, UPCAST)
        p = tl.exp2(tl.dot(q, k.trans(), input_precision="ieee") * factor - lse[:, None])
        if MASKED:
            p = tl.where(_visible(i[:, None], j[None, :], S, shift, window, CAUSAL, WINDOW), p, 0.0)
        ds = p * (tl.dot(dy, v.trans(), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, dq_ptr, stride_qb, stride_qt, stride_qh, stride_kb, stride_ks,
    stride_kh, stride_vb, stride_vs, stride_vh, T, S, window, factor, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns queries m0 … of head (b, h), as in forward. dy and dq are contiguous."""
    head, m0 = _place(T, BLOCK_M)
    b, h = (head // H).to(tl.int64), head % H
    q_ptr += b * stride_qb + h.to(tl.int64) * stride_qh
    k_ptr += b * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + (h // GROUP).to(tl.int64) * stride_vh
    shift = S - T
    factor = tl.cast(factor, tl.float32)
    i = m0 + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr, i, stride_qt, D, BLOCK_D, T, UPCAST)
    dy = _tile(dy_ptr + (b * T * H + h) * D, i, H * D, D, BLOCK_D, T, UPCAST)
    at = head.to(tl.int64) * T + i
    lse = tl.load(lse_ptr + at, mask=i < T, other=1.0e30)
    delta = tl.load(delta_ptr + at, mask=i < T, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    first, full, edge, last = _bounds(m0, T, S, shift, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if WINDOW:
        dq = _dq_tiles(dq, q, dy, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, i, first, full, S, shift, window,
                       factor, D, CAUSAL, WINDOW, True, UPCAST, BLOCK_N, BLOCK_D)  # fmt: skip
    dq = _dq_tiles(dq, q, dy, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, i, full, edge, S, shift, window,
                   factor, D, CAUSAL, WINDOW, False, UPCAST, BLOCK_N, BLOCK_D)  # fmt: skip
    dq = _dq_tiles(dq, q, dy, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, i, edge, last, S, shift, window,
                   factor, D, CAUSAL, WINDOW, True, UPCAST, BLOCK_N, BLOCK_D)  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    at = ((b * T + i) * H + h)[:, None] * D + cols[None, :]
    tl.store(dq_ptr + at, dq * tl.cast(scale, tl.float32), mask=(i < T)[:, None] & (cols < D)[None, :])


@triton.jit
def _dkdv_tiles(
    dk, dv, k, v, q_ptr, dy_ptr, lse_ptr, delta_ptr, stride_q, stride_dy, j, first, last, T, S, shift, window, factor,
    D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Blocks of queries from `first` to before `last` for one block of keys. Past S and T there is nothing to mask:
    such keys' sums are not stored, and such queries' probabilities are 0."""
    for m0 in range(first, last, BLOCK_M):
        i = m0 + tl.arange(0, BLOCK_M)
        q = _tile(q_ptr, i, stride_q, D, BLOCK_D, T, UPCAST)
        dy = _tile(dy_ptr, i, stride_dy, D, BLOCK_D, T, UPCAST)
        lse = tl.load(lse_ptr + i, mask=i < T, other=1.0e30)
        delta = tl.load(delta_ptr + i, mask=i < T, other=0.0)
        p = tl.exp2(tl.dot(k, q.trans(), input_precision="ieee") * factor - lse[None, :])  # (N, M)
        if MASKED:
            p = tl.where(_visible(i[None, :], j[:, None], S, shift, window, CAUSAL, WINDOW), p, 0.0)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
        ds = p * (tl.dot(v, dy.trans(), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, stride_qb, stride_qt, stride_qh, stride_kb,
    stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, T, S, window, factor, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns keys n0 … of key/value head (b, g), and walks over its query heads and their blocks in sight."""
    K: tl.constexpr = H // GROUP
    blocks = tl.cdiv(S, BLOCK_N)  # early keys, which more queries see, come first
    head, n0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    b, g = (head // K).to(tl.int64), head % K
    shift = S - T
    factor = tl.cast(factor, tl.float32)
    j = n0 + tl.arange(0, BLOCK_N)
    k = _tile(k_ptr + b * stride_kb + g.to(tl.int64) * stride_kh, j, stride_ks, D, BLOCK_D, S, UPCAST)
    v = _tile(v_ptr + b * stride_vb + g.to(tl.int64) * stride_vh, j, stride_vs, D, BLOCK_D, S, UPCAST)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    first, full, edge, last = 0, 0, T, T  # of query blocks; all queries from `full` to before `edge` see all these keys
    if CAUSAL:
        first = tl.maximum(n0 - shift, 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(n0 + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M
    if WINDOW:
        last = tl.minimum(T, tl.maximum(tl.minimum(n0 + BLOCK_N, S) - shift + window, 0))
        edge = tl.maximum(n0 + 1 - shift + window, 0) // BLOCK_M * BLOCK_M
    edge = tl.maximum(edge, full)
    for member in range(GROUP):
        h = g * GROUP + member
        q_at = q_ptr + b * stride_qb + h.to(tl.int64) * stride_qh
        dy_at, row = dy_ptr + (b * T * H + h) * D, (b * H + h) * T
        if CAUSAL:
            dk, dv = _dkdv_tiles(dk, dv, k, v, q_at, dy_at, lse_ptr + row, delta_ptr + row, stride_qt, H * D, j,
                                 first, tl.minimum(full, last), T, S, shift, window, factor, D, CAUSAL, WINDOW, True,
                                 UPCAST, BLOCK_M, BLOCK_D)  # fmt: skip
        dk, dv = _dkdv_tiles(dk, dv, k, v, q_at, dy_at, lse_ptr + row, delta_ptr + row, stride_qt, H * D, j, full,
                             tl.minimum(edge, last), T, S, shift, window, factor, D, CAUSAL, WINDOW, False, UPCAST,
                             BLOCK_M, BLOCK_D)  # fmt: skip
        if WINDOW:
            dk, dv = _dkdv_tiles(dk, dv, k, v, q_at, dy_at, lse_ptr + row, delta_ptr + row, stride_qt, H * D, j,
                                 edge, last, T, S, shift, window, factor, D, CAUSAL, WINDOW, True, UPCAST, BLOCK_M,
                                 BLOCK_D)  # fmt: skip
    cols = tl.arange(0, BLOCK_D)
    at = ((b * S + j) * K + g)[:, None] * D + cols[None, :]
    mask = (j < S)[:, None] & (cols < D)[None, :]
    tl.store(dk_ptr + at, dk * tl.cast(scale, tl.float32), mask=mask)
    tl.store(dv_ptr + at, dv, mask=mask)


def _config(x: Tensor, rows: str) -> dict[str, int]:
    config = tuned.config(rows, x.dtype, x.size(3), x.device)
    return dict(config, BLOCK_D=max(16, power_of_two(x.size(3))), UPCAST=INTERPRETED and x.dtype == torch.bfloat16)


def _strides(*tensors: Tensor) -> list[int]:
    """Batch, token and head strides of (B, T, H, D) tensors whose last dimension is contiguous."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


@operator()
def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(y (B, T, H, D), log₂-sum-exp (B, H, T) float32)."""
    B, T, H, D = q.shape
    y = q.new_empty((B, T, H, D))
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    config = _config(q, "flash_attention")
    launch(
        _attention_fwd_kernel, (B * H * cdiv(T, config["BLOCK_M"]),), q, k, v, y, lse, *_strides(q, k, v), T, k.size(1),
        window or 0, scale * LOG2E, H=H, GROUP=H // k.size(2), D=D, CAUSAL=causal, WINDOW=window is not None, **config,
    )  # fmt: skip
    return y, lse


@operator()
def _flash_attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, D = q.shape
    S, K = k.size(1), k.size(2)
    dq, dk, dv = q.new_empty((B, T, H, D)), k.new_empty((B, S, K, D)), v.new_empty((B, S, K, D))
    delta = torch.empty_like(lse)
    of_dq, of_dkdv = _config(q, "flash_attention_dq_backward"), _config(q, "flash_attention_backward")
    block_d = of_dq["BLOCK_D"]
    rows = max(1, 4096 // block_d)
    launch(_delta_kernel, (cdiv(B * T * H, rows),), y, dy, delta, B * T * H, T, H=H, D=D, BLOCK_N=rows, BLOCK_D=block_d)
    shared = dict(H=H, GROUP=H // K, D=D, CAUSAL=causal, WINDOW=window is not None)
    numbers = (*_strides(q, k, v), T, S, window or 0, scale * LOG2E, scale)
    inputs = (q, k, v, dy, lse, delta)
    launch(_attention_dq_kernel, (B * H * cdiv(T, of_dq["BLOCK_M"]),), *inputs, dq, *numbers, **shared, **of_dq)
    launch(
        _attention_dkdv_kernel, (B * K * cdiv(S, of_dkdv["BLOCK_N"]),), *inputs, dk, dv, *numbers, **shared, **of_dkdv
    )
    return dq, dk, dv


def _save(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, dy, _):
    grads = _flash_attention_backward(dy.contiguous(), *ctx.saved_tensors, ctx.causal, ctx.window, ctx.scale)
    return *grads, None, None, None


_flash_attention.register_autograd(_gradients, setup_context=_save)


def positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores by a scale above 0: the kernels take the maximum before they scale, and mask with −infinity."""
    if scale > LEAST:
        return q, scale
    return (-q, -scale) if scale < -LEAST else (q * scale, 1.0)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None) -> Tensor:
    """flash_attention by the kernels; tensors may have any strides but a last dimension that is contiguous."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    scale = (q.size(3) or 1) ** -0.5 if scale is None else float(scale)
    q, scale = positive(q, scale)
    return _flash_attention(q, k, v, causal, window, scale)[0]
