"""Causal attention with a sliding window and grouped key/value heads.

    y[i] = Σ_j softmax_j(scale·q[i]·k[j])·v[j],    j in [i − window, i]

(B, T, H, D) queries, (B, T, K, D) keys and values, H a multiple of K: query head h reads key/value head h // (H/K).
`window=w` lets query i see the keys i−w … i inclusive, w+1 of them, as FlashAttention counts; None is unlimited. With
more keys than queries the last query stands at the last key ("bottom-right", as in FlashAttention). 4·D FLOPs per
visible (query, key) pair and head.

The reference uses torch's scaled_dot_product_attention, which never stores the T×T scores for plain causal attention. A
window would need a T×T mask there, so it is cut into blocks of queries: each block sees one contiguous stretch of keys,
and the mask is (block, block + window).

Source: Dao et al., FlashAttention, arXiv:2205.14135; sliding windows: Beltagy et al., Longformer, arXiv:2004.05150.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import triton_runs
from ..registry import Case, Op, check_device, itemsize, randn, register
from ..triton_utils import chunk_ranges
from .backends import flash
from .triton_flash import LARGEST_HEAD, attend


def flash_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: int | None = None, scale: float | None = None
) -> Tensor:
    T, S = q.size(1), k.size(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T or S, D)
    gqa = True if q.size(1) != k.size(1) else False  # under torch.compile the comparison alone may be a SymBool
    window = None if window is None or window >= S - 1 else window
    if not causal or (window is None and T == S):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa).transpose(1, 2)
    shift = S - T  # query i stands at key position i + shift
    blind = min(max(-shift, 0), T)  # queries before the first key see nothing
    outputs = [q[:, :, :blind].masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)] if blind else []
    for start, end in chunk_ranges(blind, T, max(window or 0, 128)):
        first, last = 0 if window is None else max(start + shift - window, 0), end + shift
        i = torch.arange(start + shift, end + shift, device=q.device)[:, None]
        j = torch.arange(first, last, device=q.device)[None, :]
        visible = j <= i if window is None else (j <= i) & (j >= i - window)  # (block, block + window)
        keys, values = k[:, :, first:last], v[:, :, first:last]
        outputs.append(
            F.scaled_dot_product_attention(q[:, :, start:end], keys, values, visible, scale=scale, enable_gqa=gqa)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2) if outputs else q.transpose(1, 2)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Attention of q (B, T, H, D) over k, v (B, S, K, D), H a multiple of K; returns (B, T, H, D) in q's dtype.

    The last query stands at the last key. window: None, or w ≥ 0 for that key and the w before it (causal only). scale:
    None for 1/√D. A query that sees no key (T > S) gets 0. Raises ValueError when shapes, dtypes or devices do not fit,
    or when a window is asked for without causality.
    """
    check_shapes("flash_attention", q, k, v)
    if window is not None and (window < 0 or not causal):
        raise ValueError(f"flash_attention: window is {window} with causal={causal}, wanted window ≥ 0 and causal=True")
    window = _limited(window, k)
    found = flash(q, k, v, causal, window, scale)
    if found is not None:
        return found
    if triton_runs("flash_attention", q, q.size(3), LARGEST_HEAD):
        return attend(q, k, v, causal, window, scale)
    return flash_attention_reference(q, k, v, causal, window, scale)


def _limited(window: int | None, k: Tensor) -> int | None:
    """None for a window that sees every key."""
    return None if window is None or window >= k.size(1) - 1 else window


def _flash_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: int | None = None, scale: float | None = None
) -> Tensor:
    return attend(q, k, v, causal, _limited(window, k), scale)


def check_shapes(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.size(0) != k.size(0) or q.size(3) != k.size(3):
        raise ValueError(
            f"{op}: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
            "wanted (B, T, H, D) and twice (B, S, K, D)"
        )
    check_device(op, q, k=k, v=v)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"{op}: q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must agree")
    if not k.size(2) or not q.size(2) or q.size(2) % k.size(2):
        raise ValueError(f"{op}: q has H={q.size(2)} heads and k K={k.size(2)}; H must be a multiple of K, neither 0")


def visible_pairs(T: int, window: int | None) -> int:
    """How many (query, key) pairs a causal window over T tokens has."""
    w = T - 1 if window is None else min(window, T - 1)
    return (w + 1) * T - w * (w + 1) // 2


def _inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    kv = (case["B"], case.get("S", case["T"]), case["K"], case["D"])
    return dict(
        q=randn((case["B"], case["T"], case["H"], case["D"]), dtype, device, 0),
        k=randn(kv, dtype, device, 1),
        v=randn(kv, dtype, device, 2),
        causal=True,
        window=case["W"] if case["W"] >= 0 else None,
    )


register(
    Op(
        name="flash_attention",
        fn=flash_attention,
        reference=flash_attention_reference,
        inputs=_inputs,
        cases={  # W = −1: no window
            "one_token": dict(B=1, T=1, H=2, K=1, D=32, W=-1),
            "odd": dict(B=2, T=77, H=6, K=3, D=40, W=13),
            "window_0": dict(B=1, T=9, H=2, K=2, D=32, W=0),
            "odd_longer": dict(B=2, T=21, S=70, H=4, K=2, D=24, W=19),
            "odd_shorter": dict(B=1, T=50, S=33, H=2, K=1, D=16, W=-1),
            "blocks": dict(B=1, T=300, H=2, K=1, D=32, W=130),
            "d4": dict(B=2, T=256, H=4, K=4, D=64, W=128),
            "d12": dict(B=32, T=2048, H=6, K=6, D=128, W=512),
            "head_64": dict(B=8, T=2048, H=16, K=4, D=64, W=512),
            "head_256": dict(B=8, T=2048, H=8, K=4, D=256, W=512),
            "d24": dict(B=16, T=2048, H=12, K=12, D=128, W=512),
            "d24_full": dict(B=16, T=2048, H=12, K=12, D=128, W=-1),
        },
        flops=lambda case: (
            4 * case["B"] * case["H"] * case["D"] * visible_pairs(case["T"], case["W"] if case["W"] >= 0 else None)
        ),
        bytes=lambda case, dtype: 2 * case["B"] * case["T"] * (case["H"] + case["K"]) * case["D"] * itemsize(dtype),
        tolerance={torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3},
        differentiable=("q", "k", "v"),
        triton=_flash_attention_triton,
        size=lambda case: case["D"],
        probe=lambda size: tuple(dict(B=1, T=150, H=2, K=1, D=size, W=window) for window in (-1, 50)),
    )
)
