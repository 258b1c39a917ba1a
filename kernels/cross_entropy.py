"""Cross-entropy of softcapped logits.

    z = softcap·tanh(logits/softcap),    loss[n] = logsumexp(z[n]) − z[n, target[n]]

logits are (N, V), targets (N,) int64; rows whose target is `ignore_index` count for nothing. Everything is computed in
float32 (float64 for float64). Memory-bound: one read of the logits gives the loss, and could give the gradient too;
PyTorch as separate calls reads and writes them six times. `linear_cross_entropy` goes further and never stores them.

A mean over no rows at all is NaN, as in torch.

Source: softcapping: Gemma 2, arXiv:2408.00118.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.registry import Case, Op, itemsize, randint, randn, register

REDUCTIONS = ("mean", "sum", "none")


def softcap_reference(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap·tanh(logits/softcap) in float32 (float64 stays); None leaves the logits as they are."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy_reference(
    logits: Tensor, targets: Tensor, softcap: float | None = None, ignore_index: int = -1, reduction: str = "mean"
) -> Tensor:
    return F.cross_entropy(softcap_reference(logits, softcap), targets, ignore_index=ignore_index, reduction=reduction)


def cross_entropy(
    logits: Tensor, targets: Tensor, softcap: float | None = None, ignore_index: int = -1, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of logits (N, V) against targets (N,) int64; see the module's docstring.

    Returns a scalar for "mean" and "sum", (N,) for "none" (0 where ignored), in float32 (float64 for float64).
    Raises ValueError when shapes or the reduction are wrong.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: targets are {tuple(targets.shape)} and logits {tuple(logits.shape)}, "
            "wanted (N,) and (N, V)"
        )
    check_reduction("cross_entropy", reduction)
    return cross_entropy_reference(logits, targets, softcap, ignore_index, reduction)


def check_reduction(op: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, wanted one of {', '.join(REDUCTIONS)}")


def _inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    targets = randint(case["V"], (case["N"],), device, 1)
    targets[:: max(2, case["N"] // 5)] = -1
    logits = randn((case["N"], case["V"]), dtype, device, 0, scale=4.0)
    return dict(logits=logits, targets=targets, softcap=15.0)


register(
    Op(
        name="cross_entropy",
        fn=cross_entropy,
        reference=cross_entropy_reference,
        inputs=_inputs,
        cases={
            "odd": dict(N=33, V=101),
            "d4": dict(N=256, V=4096),
            "d12": dict(N=32 * 2048, V=32768),
            "d24": dict(N=16 * 2048, V=32768),
        },
        flops=lambda case: 8 * case["N"] * case["V"],
        bytes=lambda case, dtype: case["N"] * case["V"] * itemsize(dtype),
        differentiable=("logits",),
    )
)
