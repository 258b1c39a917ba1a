"""Attention of a few new queries over a KV cache whose rows have different lengths.

Row b of the cache holds keys for the positions 0, 1, 2, …; its new queries stand at start[b], start[b]+1, … and their
own keys are already in the cache. A query at position i sees the keys i−window … i of its row. What lies beyond in the
cache (left over, or padding) is never seen, but must be finite, as 0 · NaN is NaN. Bound by memory: every key and
value in sight is read once, for 4·D FLOPs a pair; splitting long rows over more programs is what a kernel can add.

Source: the paged and split decode kernels of FlashAttention (Dao et al.) and vLLM (arXiv:2309.06180) serve the same
need.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import triton_runs
from ..registry import Case, Op, check_device, itemsize, randint, randn, register
from .flash import check_shapes
from .triton_decode import decode
from .triton_flash import LARGEST_HEAD


def flash_attention_decode_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, window: int | None = None, scale: float | None = None
) -> Tensor:
    i = start[:, None] + torch.arange(q.size(1), device=q.device)  # (B, Tq), the queries' positions
    j = torch.arange(k_cache.size(1), device=q.device)  # (S,)
    visible = j <= i[..., None]  # (B, Tq, S)
    if window is not None:
        visible &= j >= i[..., None] - window
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))  # (B, heads, T, D)
    gqa = True if q.size(1) != k.size(1) else False  # under torch.compile the comparison alone may be a SymBool
    return F.scaled_dot_product_attention(q, k, v, visible[:, None], scale=scale, enable_gqa=gqa).transpose(1, 2)


def flash_attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Attention of q (B, Tq, H, D) over k_cache, v_cache (B, S, K, D); start (B,) int64 is the position of q[:, 0].

    Needs start[b] + Tq ≤ S. Returns (B, Tq, H, D) in q's dtype; no gradient is promised. Raises ValueError when shapes
    do not fit.
    """
    check_shapes("flash_attention_decode", q, k_cache, v_cache)
    if start.shape != q.shape[:1]:
        raise ValueError(f"flash_attention_decode: start is {tuple(start.shape)}, wanted (B,) with B={q.size(0)}")
    if start.is_floating_point():
        raise ValueError(f"flash_attention_decode: start is {start.dtype}, wanted integers")
    check_device("flash_attention_decode", q, start=start)
    if window is not None and window < 0:
        raise ValueError(f"flash_attention_decode: window is {window}, wanted None or ≥ 0")
    if triton_runs("flash_attention_decode", q, q.size(3), LARGEST_HEAD):
        return decode(q, k_cache, v_cache, start, window, scale)
    return flash_attention_decode_reference(q, k_cache, v_cache, start, window, scale)


def _inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    kv = (case["B"], case["S"], case["K"], case["D"])
    return dict(
        q=randn((case["B"], case["Tq"], case["H"], case["D"]), dtype, device, 0),
        k_cache=randn(kv, dtype, device, 1),
        v_cache=randn(kv, dtype, device, 2),
        start=randint(case["S"] - case["Tq"] + 1, (case["B"],), device, 3),
        window=case["W"] if case["W"] >= 0 else None,
    )


register(
    Op(
        name="flash_attention_decode",
        fn=flash_attention_decode,
        reference=flash_attention_decode_reference,
        inputs=_inputs,
        cases={
            "odd": dict(B=3, Tq=1, S=45, H=6, K=3, D=40, W=13),
            "odd_long": dict(B=2, Tq=2, S=1100, H=4, K=1, D=24, W=-1),
            "odd_few": dict(B=2, Tq=33, S=64, H=4, K=2, D=32, W=-1),
            "prefill": dict(B=2, Tq=75, S=91, H=4, K=2, D=24, W=29),
            "prompt": dict(B=1, Tq=1500, S=2048, H=12, K=12, D=128, W=512),
            "d24": dict(B=32, Tq=1, S=2048, H=12, K=12, D=128, W=512),
        },
        flops=lambda case: 4 * case["B"] * case["H"] * case["D"] * case["Tq"] * case["S"],
        bytes=lambda case, dtype: 2 * case["B"] * case["S"] * case["K"] * case["D"] * itemsize(dtype),
        tolerance={torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3},
        triton=decode,
        size=lambda case: case["D"],
        probe=lambda size: (
            dict(B=2, Tq=1, S=600, H=2, K=1, D=size, W=50),
            dict(B=1, Tq=75, S=600, H=2, K=1, D=size, W=-1),
        ),
    )
)
