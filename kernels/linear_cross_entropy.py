"""The language model's head and its loss in one operation that never holds all the logits.

    logits = x·weightᵀ   (N, V),    then cross_entropy(logits, targets, softcap)

At N = 32,768 tokens and V = 32,768 the float32 logits are 4.3 GB, and their gradient as much again. Walking over chunks
of tokens, only one chunk's logits exist at a time. Since the loss is a plain sum over tokens, a chunk's gradient is
known as soon as its logits are: forward computes loss, dx and dW together (3 matrix products of 2·N·V·C FLOPs, the same
as forward plus backward), and backward only multiplies by the incoming scalar. For `reduction="none"` every token has
an incoming gradient of its own, unknown in forward; backward then recomputes the logits (a fourth product).

dW is accumulated in float32. Where the caller keeps a gradient of the weight, as over micro-batches, backward adds dW
times the incoming scalar to it in one pass (12 bytes an element; multiplied first and then added by autograd, 20), and
the weight may be in 16 bits: cast once a step, not at every use. Without gradients no gradient work is done. A mean
over no rows is NaN, as in torch.
It does not pay in time (2 ms of a 328 ms step at d24); it pays in memory, which buys batch size.

With fp8=True the three products are in fp8: x and the weight are rounded once, each chunk's gradient where it lies; no
maximum of it is looked for, since |softmax − onehot| ≤ 1.

The matrix products are cuBLAS's. The Triton kernel is the one of cross_entropy.py, in place on the chunk's logits: it
reads them once and leaves their gradient there. On GPUs a chunk is of 4–8 K tokens: smaller ones, that would fit the L2
cache, read the weight again and add to a float32 dW (201 MB at d24) for every chunk, about 12 ms to save 0.7.

Source: the chunking follows the idea of Liger-Kernel's fused linear cross-entropy (arXiv:2410.10989) and of Wijmans et
al., Cut Your Losses, arXiv:2411.09009.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tuned
from .cross_entropy import (
    _cross_entropy_gradient_,
    check_reduction,
    check_targets,
    cross_entropy_reference,
    mean,
    reduced,
    softcap_reference,
    token_losses,
)
from .dispatch import mode, triton_runs
from .fp8.quantize import E4M3, E5M2, FP8_ROW, product, quantize
from .linears import _add_product
from .registry import Case, Op, check_device, itemsize, randint, randn, register, wide, without_autocast
from .triton_utils import chunk_ranges, operator, specialized

CHUNK_LOGITS = 1 << 23  # logits alive at a time: 32 MB in float32, fits a server CPU's last-level cache


def chunk_rows(vocab: int, fused: bool, x: Tensor) -> int:
    """Tokens per chunk: of the tuned table on GPUs; else as many as keep the logits within CHUNK_LOGITS."""
    if fused or x.is_cuda:
        return tuned.value("linear_cross_entropy", "rows", x.dtype, specialized(vocab), x.device)
    return max(64, CHUNK_LOGITS // vocab // 64 * 64)


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, grad: Tensor | None, softcap: float | None, ignore_index: int, fused: bool
) -> tuple[Tensor, Tensor]:
    """Of one chunk: Σ loss, and the gradient of Σ grad[n]·loss[n] (None: 1 each) as to the logits, in their dtype.

    The gradient is grad·(softmax(z) − onehot)·(1 − (z/softcap)²).
    """
    if fused:
        each = (
            torch.ones(targets.shape, dtype=torch.float32, device=logits.device) if grad is None else grad.contiguous()
        )
        return _cross_entropy_gradient_(logits, targets, each, softcap, ignore_index).sum(), logits
    # One pass for the exponentials' sum, one for the gradient: compiled, three times as fast as softmax and scatter.
    z = softcap_reference(logits, softcap)
    kept = targets != ignore_index
    index = torch.where(kept, targets, 0)[:, None]
    top = z.amax(-1, keepdim=True)
    weights = torch.exp(z - top)
    whole = weights.sum(-1, keepdim=True)
    losses = (top + torch.log(whole) - z.gather(1, index))[:, 0]
    total = torch.where(kept, losses, 0).sum()
    hot = torch.arange(z.size(1), device=z.device) == index
    dz = weights * (1 / whole) - hot.to(z.dtype)
    dz = dz * (kept if grad is None else grad * kept)[:, None]
    dz = dz if softcap is None else dz * (1 - (z / softcap) ** 2)
    return total, dz.to(logits.dtype)


@operator(mutates=("dw",))
def _add_fp8_product(dw: Tensor, dlogits: Tensor, x: Tensor, inverse: Tensor) -> None:
    """dw (V, C) += dlogits·xᵀ·inverse for fp8 dlogits (V, n) and x (C, n). An operator as _add_product is."""
    dw += product(dlogits, x, inverse, dw.dtype, exact=True)


@operator(mutates=("gradient",))
def _add_scaled(gradient: Tensor, dw: Tensor, scale: Tensor) -> None:
    """gradient (V, C) += dw·scale for a 0-d scale. An operator as _add_product is."""
    gradient.addcmul_(dw, scale)


@operator(mutates=("losses",))
def _add_losses(losses: Tensor, chunk: Tensor, start: int) -> None:
    """losses[start : start + n] += chunk (n,). An operator, because a compiler that sees the sum computes all losses at
    the end, in one kernel, and keeps every chunk's logits until then.
    """
    losses[start : start + chunk.size(0)] += chunk


class _Head:
    """The products of a chunk (a slice of tokens) with the weight; backward's at once."""

    def __init__(self, x: Tensor, weight: Tensor):
        self.x, self.w = x, weight.to(x.dtype)

    def logits(self, at: slice) -> Tensor:
        return self.x[at] @ self.w.T

    def gradients(self, at: slice, dlogits: Tensor, bound: Tensor, wx: bool, dw: Tensor | None) -> Tensor:
        """dx of the chunk, of no rows unless wanted. Adds to dw."""
        if dw is not None:
            _add_product(dw, dlogits, self.x[at])
        return (dlogits if wx else dlogits[:0]) @ self.w


class _Fp8Head:
    """The same in fp8. No gradient of a logit exceeds the incoming one, `bound`: its scale is known without looking."""

    def __init__(self, x: Tensor, weight: Tensor, fused: bool):
        self.dtype, self.fused = x.dtype, fused
        self.x, self.w = quantize(x, E4M3, fused), quantize(weight.contiguous(), E4M3, fused)

    def logits(self, at: slice) -> Tensor:
        return product(self.x.values[at], self.w.values, self.x.inverse * self.w.inverse, self.dtype)

    def gradients(self, at: slice, dlogits: Tensor, bound: Tensor, wx: bool, dw: Tensor | None) -> Tensor:
        d = quantize(dlogits, E5M2, self.fused, bound=bound)
        if dw is not None:
            x = self.x.transposed[:, at]  # (C, n)
            x = x.contiguous() if self.x.transposed.size(1) % FP8_ROW else x
            _add_fp8_product(dw, d.transposed, x, d.inverse * self.x.inverse)
        values = d.values if wx else d.values[:0]
        return product(values, self.w.transposed, d.inverse * self.w.inverse, self.dtype, exact=True)


def _head(x: Tensor, weight: Tensor, fp8: str) -> _Head | _Fp8Head:
    """fp8: "", or whose kernels round, "torch" or "triton"."""
    return _Fp8Head(x, weight, fp8 == "triton") if fp8 else _Head(x, weight)


def _rounds(x: Tensor) -> str:
    """Whose kernels round x: if ours are not forced, as for fp8_linear, which an architecture or probe may refuse."""
    ours = mode("linear_cross_entropy") == "triton" or triton_runs("fp8_linear", x, x.size(1))
    return "triton" if ours else "torch"


def _chunks(x: Tensor, weight: Tensor, fused: bool, fp8: str) -> list[slice]:
    longest = chunk_rows(weight.size(0), fused, x)
    return [slice(*ends) for ends in chunk_ranges(0, x.size(0), longest, FP8_ROW if fp8 else 1)]


class _SummedLoss(torch.autograd.Function):
    """Σ of the token losses. Gradients are made in forward, chunk by chunk, and scaled in backward."""

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, ignore_index, fused, fp8, gradient):
        wx, ww = ctx.needs_input_grad[:2]
        head = _head(x, weight, fp8)
        total = torch.zeros(1, dtype=wide(x.dtype), device=x.device)
        dw = torch.zeros(weight.shape, dtype=wide(x.dtype), device=x.device) if ww else None
        one = torch.ones((), device=x.device)
        dx = [torch.zeros_like(x[:0])]
        for at in _chunks(x, weight, fused, fp8):
            # the only logits alive: (n, V)
            loss, dlogits = _loss_and_gradient(head.logits(at), targets[at], None, softcap, ignore_index, fused)
            _add_losses(total, loss[None], 0)
            dx.append(head.gradients(at, dlogits, one, wx, dw))
        ctx.save_for_backward(torch.cat(dx) if wx else None, dw)
        ctx.weight_dtype, ctx.gradient = weight.dtype, gradient
        return total.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        dx = None if dx is None else dx * grad  # 0-d: keeps dx's dtype, multiplies in float32
        if dw is not None and ctx.gradient is not None:
            _add_scaled(ctx.gradient, dw, grad)
            dw = None
        dw = None if dw is None else (dw * grad).to(ctx.weight_dtype)
        return dx, dw, *[None] * 6


class _TokenLosses(torch.autograd.Function):
    """The loss of every token, (N,). Backward recomputes the logits."""

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, ignore_index, fused, fp8, gradient):
        ctx.save_for_backward(x, weight, targets)
        ctx.settings, ctx.gradient = (softcap, ignore_index, fused, fp8), gradient
        head = _head(x, weight, fp8)
        losses = torch.zeros(x.size(0), dtype=wide(x.dtype), device=x.device)
        for at in _chunks(x, weight, fused, fp8):
            if fused:
                each = token_losses(head.logits(at), targets[at], softcap, ignore_index)
            else:
                each = cross_entropy_reference(head.logits(at), targets[at], softcap, ignore_index, "none")
            _add_losses(losses, each, at.start)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, targets = ctx.saved_tensors
        softcap, ignore_index, fused, fp8 = ctx.settings
        head = _head(x, weight, fp8)
        kept = ctx.gradient if ctx.needs_input_grad[1] else None
        dw = torch.zeros(weight.shape, dtype=grad.dtype, device=x.device) if kept is None else kept
        bound = grad.abs().amax() if fp8 and grad.numel() else grad.new_zeros(())
        dx = [torch.zeros_like(x[:0])]
        for at in _chunks(x, weight, fused, fp8):
            _, dlogits = _loss_and_gradient(head.logits(at), targets[at], grad[at], softcap, ignore_index, fused)
            dx.append(head.gradients(at, dlogits, bound, True, dw))
        return torch.cat(dx), dw.to(weight.dtype) if kept is None else None, *[None] * 6


def _chunked(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignore_index: int, reduction: str, fused: bool,
    fp8: bool, gradient: Tensor | None,
) -> Tensor:  # fmt: skip
    targets = targets.contiguous()
    rounding = "" if not fp8 else _rounds(x) if fused else "torch"
    learning = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if reduction == "none" or not learning:
        with without_autocast(x):
            losses = _TokenLosses.apply(x, weight, targets, softcap, ignore_index, fused, rounding, gradient)
        return reduced(losses, targets, ignore_index, reduction)
    with without_autocast(x):
        total = _SummedLoss.apply(x, weight, targets, softcap, ignore_index, fused, rounding, gradient)
    return mean(total, targets, ignore_index) if reduction == "mean" else total


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    fp8: bool = False,
    gradient: Tensor | None = None,
) -> Tensor:
    return _chunked(x, weight, targets, softcap, ignore_index, reduction, False, fp8, gradient)


def _linear_cross_entropy_triton(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    fp8: bool = False,
    gradient: Tensor | None = None,
) -> Tensor:
    return _chunked(x, weight, targets, softcap, ignore_index, reduction, True, fp8, gradient)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    fp8: bool = False,
    gradient: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of x·weightᵀ against targets; see the module's docstring.

    x: (N, C); weight: (V, C), cast to x's dtype for the products; targets: (N,) int64, in [0, V) or ignore_index.
    fp8: the products in fp8 (fp8/quantize.py), for float32 and bfloat16.
    gradient: (V, C) float32 (float64 for float64), kept by the caller: backward adds weight's gradient to it, and gives
    autograd none.
    Returns a float32 scalar (mean, sum) or (N,) (none; 0 where ignored); float64 for float64. Differentiable once, in
    x and weight. Raises ValueError when shapes, dtypes or the reduction are wrong.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.size(1) != weight.size(1):
        raise ValueError(
            f"linear_cross_entropy: weight is {tuple(weight.shape)} and x {tuple(x.shape)}, wanted (V, C) and (N, C)"
        )
    if targets.shape != x.shape[:1]:
        raise ValueError(f"linear_cross_entropy: targets are {tuple(targets.shape)}, wanted (N,) with N={x.size(0)}")
    check_reduction("linear_cross_entropy", reduction)
    check_device("linear_cross_entropy", x, weight=weight, targets=targets)
    check_targets("linear_cross_entropy", targets, weight.size(0), ignore_index)
    if fp8 and x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"linear_cross_entropy: x is {x.dtype}, wanted float32 or bfloat16 for fp8 products")
    if gradient is not None:
        check_device("linear_cross_entropy", x, gradient=gradient)
        if gradient.shape != weight.shape or gradient.dtype != wide(x.dtype):
            raise ValueError(
                f"linear_cross_entropy: gradient is {tuple(gradient.shape)} {gradient.dtype}, wanted as weight, "
                f"{tuple(weight.shape)}, in {wide(x.dtype)}"
            )
    runs = triton_runs("linear_cross_entropy", x, weight.size(0))
    implementation = _linear_cross_entropy_triton if runs else linear_cross_entropy_reference
    return implementation(x, weight, targets, softcap, ignore_index, reduction, fp8, gradient)


def _inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    targets = randint(case["V"], (case["N"],), device, 2)
    targets[:: max(2, case["N"] // 5)] = -1
    return dict(
        x=randn((case["N"], case["C"]), dtype, device, 0),
        weight=randn((case["V"], case["C"]), dtype, device, 1, scale=4 * case["C"] ** -0.5),
        targets=targets,
        softcap=15.0,
    )


register(
    Op(
        name="linear_cross_entropy",
        fn=linear_cross_entropy,
        reference=linear_cross_entropy_reference,
        inputs=_inputs,
        cases={
            "odd": dict(N=33, V=101, C=40),
            "d4": dict(N=600, V=4096, C=256),
            "d12": dict(N=32 * 2048, V=32768, C=768),
            "d24": dict(N=16 * 2048, V=32768, C=1536),
        },
        flops=lambda case: 2 * case["N"] * case["V"] * case["C"],
        bytes=lambda case, dtype: (case["N"] + case["V"]) * case["C"] * itemsize(dtype),
        differentiable=("x", "weight"),
        triton=_linear_cross_entropy_triton,
        size=lambda case: case["V"],
        probe=lambda size: (dict(N=33, V=size, C=64),),
    )
)
