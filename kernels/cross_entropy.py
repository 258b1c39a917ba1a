"""Cross-entropy of softcapped logits.

    z = softcap·tanh(logits/softcap),    loss[n] = logsumexp(z[n]) − z[n, target[n]]

logits are (N, V), targets (N,) int64; rows whose target is `ignore_index` count for nothing. Everything is computed in
float32 (float64 for float64). Memory-bound: forward reads the logits once, backward reads them once more and writes the
gradient: 3·N·V elements, while PyTorch as separate calls moves them six times. `linear_cross_entropy`, whose logits are
its own, gets loss and gradient from one read and one write, in place.

How the kernel is made: a program owns a row and walks over it in blocks. Each lane keeps its own running maximum and
sum of exponentials (the "online softmax" of Milakov & Gimelshein, arXiv:1805.02867), so lanes meet only once, at the
end; the sum is kept apart from the maximum, because their total, the log-sum-exp, would lose the sum's digits for large
logits. The gradient is a second walk, which finds the row (64 KB at V = 32,768 in bfloat16) in the L2 cache. tanh(u) is
written as 2·sigmoid(2u) − 1: one exponential, where the library's is a polynomial and a branch that can make the kernel
arithmetic-bound.

A mean over no rows at all is NaN, as in torch. A target outside the vocabulary is an error on CPUs; on a GPU, where
looking would wait for the card, our kernel gives NaN for its row's loss and gradient and reads nothing outside the row
(PyTorch's ends the process).

Source: softcapping: Gemma 2, arXiv:2408.00118.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import tuned
from .dispatch import triton_runs
from .registry import Case, Op, check_device, itemsize, randint, randn, register, wide
from .triton_utils import launch, operator, power_of_two, tl, triton

REDUCTIONS = ("mean", "sum", "none")


def softcap_reference(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap·tanh(logits/softcap) in float32 (float64 stays); None leaves the logits as they are."""
    logits = logits.to(wide(logits.dtype))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy_reference(
    logits: Tensor, targets: Tensor, softcap: float | None = None, ignore_index: int = -1, reduction: str = "mean"
) -> Tensor:
    return F.cross_entropy(softcap_reference(logits, softcap), targets, ignore_index=ignore_index, reduction=reduction)


# ---- Triton


@triton.jit
def _capped(logits_ptr, cols, V, softcap, SOFTCAP: tl.constexpr):
    """Softcapped logits of some columns in float32; 0 beyond the vocabulary."""
    z = tl.load(logits_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    if SOFTCAP:
        z = softcap * (2.0 * tl.sigmoid(z * (2.0 / softcap)) - 1.0)
    return z


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, grad_ptr, loss_ptr, lse_ptr, dlogits_ptr, V, stride_n, stride_dn, softcap, ignore_index,
    SOFTCAP: tl.constexpr, KNOWN: tl.constexpr, GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program owns a row: one walk for loss and log-sum-exp (unless KNOWN), one for the gradient (if GRAD).

    dlogits may be logits: a lane reads each element before it writes it, and no other lane does.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_n
    dlogits_ptr += row * stride_dn
    softcap = tl.cast(softcap, tl.float32)
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK_V)
    kept = target != ignore_index
    inside = (target >= 0) & (target < V)
    if KNOWN:
        top = tl.load(lse_ptr + 2 * row)
        rest = tl.load(lse_ptr + 2 * row + 1)
    else:
        # Before the walk: the barriers of its sums keep this before any lane writes a gradient in its place.
        own = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
        largest = tl.full((BLOCK_V,), -3.0e38, dtype=tl.float32)
        total = tl.zeros((BLOCK_V,), dtype=tl.float32)
        for start in range(0, V, BLOCK_V):
            z = _capped(logits_ptr, start + cols, V, softcap, SOFTCAP)
            z = tl.where(start + cols < V, z, -3.0e38)  # below all others
            larger = tl.maximum(largest, z)
            total = total * tl.exp(largest - larger) + tl.exp(z - larger)
            largest = larger
        top = tl.max(largest, axis=0)
        rest = tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
        if SOFTCAP:
            own = softcap * (2.0 * tl.sigmoid(own * (2.0 / softcap)) - 1.0)
        tl.store(loss_ptr + row, tl.where(kept, rest - (own - top), 0.0))
        tl.store(lse_ptr + 2 * row, top)
        tl.store(lse_ptr + 2 * row + 1, rest)
    if GRAD:
        weight = tl.load(grad_ptr + row).to(tl.float32)
        weight = tl.where(inside, weight, float("nan"))
        for start in range(0, V, BLOCK_V):
            at = start + cols
            z = _capped(logits_ptr, at, V, softcap, SOFTCAP)
            dz = (tl.exp((z - top) - rest) - tl.where(at == target, 1.0, 0.0)) * weight
            if SOFTCAP:
                dz = dz * (1.0 - (z * (1.0 / softcap)) * (z * (1.0 / softcap)))
            tl.store(dlogits_ptr + at, tl.where(kept, dz, 0.0), mask=at < V)


def _run(
    logits: Tensor, targets: Tensor, grad: Tensor, lse: Tensor, dlogits: Tensor | None, softcap: float | None,
    ignore_index: int, known: bool,
) -> Tensor:  # fmt: skip
    """Launches the kernel; returns the losses (N,) float32 (not written when lse is known)."""
    n, v = logits.shape
    config = tuned.config("cross_entropy", logits.dtype, v, logits.device)
    config["BLOCK_V"] = min(config["BLOCK_V"], max(16, power_of_two(v)))
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    out = logits if dlogits is None else dlogits
    launch(
        _cross_entropy_kernel, (n,), logits, targets, grad, loss, lse, out, v, logits.stride(0), out.stride(0),
        1.0 if softcap is None else float(softcap), ignore_index, SOFTCAP=softcap is not None, KNOWN=known,
        GRAD=dlogits is not None, **config,
    )  # fmt: skip
    return loss


@operator()
def _cross_entropy(logits: Tensor, targets: Tensor, softcap: float | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(losses (N,), the two parts of the log-sum-exp (N, 2): maximum and rest), float32."""
    lse = torch.empty((logits.size(0), 2), dtype=torch.float32, device=logits.device)
    return _run(logits, targets, lse, lse, None, softcap, ignore_index, known=False), lse


@operator()
def _cross_entropy_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, softcap: float | None, ignore_index: int
) -> Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run(logits, targets, grad, lse, dlogits, softcap, ignore_index, known=True)
    return dlogits


@operator(mutates=("logits",))
def _cross_entropy_gradient_(
    logits: Tensor, targets: Tensor, grad: Tensor, softcap: float | None, ignore_index: int
) -> Tensor:
    """The losses (N,); logits become the gradient of Σ grad[n]·loss[n]."""
    lse = torch.empty((logits.size(0), 2), dtype=torch.float32, device=logits.device)
    return _run(logits, targets, grad, lse, logits, softcap, ignore_index, known=False)


def _save(ctx, inputs, output):
    logits, targets, ctx.softcap, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad, _):
    dlogits = _cross_entropy_backward(grad.contiguous(), *ctx.saved_tensors, ctx.softcap, ctx.ignore_index)
    return dlogits, None, None, None


_cross_entropy.register_autograd(_gradients, setup_context=_save)


def token_losses(logits: Tensor, targets: Tensor, softcap: float | None, ignore_index: int) -> Tensor:
    """(N,) losses by the kernel; logits (N, V) may have any row stride."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return _cross_entropy(logits, targets.contiguous(), softcap, ignore_index)[0]


# ---- the public function


def reduced(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Token losses (0 where ignored) to a scalar, or left as they are for "none"."""
    if reduction == "none":
        return losses
    return mean(losses.sum(), targets, ignore_index) if reduction == "mean" else losses.sum()


def mean(total: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """total over the number of rows that count; NaN without any, as in torch, and then with gradients of 0."""
    count = (targets != ignore_index).sum()
    return total / count.clamp_min(1) + torch.where(count > 0, 0.0, math.nan)


def _cross_entropy_triton(
    logits: Tensor, targets: Tensor, softcap: float | None = None, ignore_index: int = -1, reduction: str = "mean"
) -> Tensor:
    return reduced(token_losses(logits, targets, softcap, ignore_index), targets, ignore_index, reduction)


def cross_entropy(
    logits: Tensor, targets: Tensor, softcap: float | None = None, ignore_index: int = -1, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of logits (N, V) against targets (N,) int64; see the module's docstring.

    Returns a scalar for "mean" and "sum", (N,) for "none" (0 where ignored), in float32 (float64 for float64).
    Raises ValueError when shapes, the targets' dtype or (on CPUs) values, or the reduction are wrong.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: targets are {tuple(targets.shape)} and logits {tuple(logits.shape)}, "
            "wanted (N,) and (N, V)"
        )
    check_reduction("cross_entropy", reduction)
    check_device("cross_entropy", logits, targets=targets)
    check_targets("cross_entropy", targets, logits.size(1), ignore_index)
    if triton_runs("cross_entropy", logits, logits.size(1)):
        return _cross_entropy_triton(logits, targets, softcap, ignore_index, reduction)
    return cross_entropy_reference(logits, targets, softcap, ignore_index, reduction)


def check_reduction(op: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, wanted one of {', '.join(REDUCTIONS)}")


def check_targets(op: str, targets: Tensor, vocab: int, ignore_index: int) -> None:
    """Raises ValueError for targets that are not int64, or, where that is known at once, outside the vocabulary."""
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets are {targets.dtype}, wanted int64")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(targets, FakeTensor):
        wrong = targets[((targets < 0) | (targets >= vocab)) & (targets != ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"{op}: targets hold {wrong[0].item()}, wanted 0 to {vocab - 1} (V={vocab}), or "
                f"ignore_index={ignore_index}"
            )


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
        triton=_cross_entropy_triton,
        size=lambda case: case["V"],
        probe=lambda size: (dict(N=33, V=size),),
    )
)
