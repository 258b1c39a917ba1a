"""Linear layers of one input, whose gradients are summed in the products that make them.

    yᵢ = x·wᵢᵀ,     dx = Σᵢ dyᵢ·wᵢ,     gᵢ += dyᵢᵀ·x

Autograd makes every dyᵢ·wᵢ by itself and adds them in a pass that reads all and writes one more, n + 1 tensors of x's
size alive at a time. Here the first product writes dx, and each other adds to it what it has summed in float32 (beta =
1 in the library's GEMM, which has FLOPs enough to hide that reading): n roundings instead of n + 1, and no pass.
For q, k, v and the gates of four layers of d24 at 32,768 tokens, as compiled for an H100, a forward and a backward
stream 30.6 GB instead of 32.2, and their products move 0.8 GB more.

The same for weights, where the caller keeps their gradients gᵢ in float32, as over micro-batches: autograd would write
the product in 16 bits (2 bytes an element), and another pass add it (10). The product that adds moves 8, and the sum is
rounded nowhere between the matrix unit and g. For all matrices of those four layers a forward and a backward stream
30.6 GB instead of 31.7, and their products move 0.7 GB more; a backward returns no gradient of a matrix (1.4 GB of 24
layers).

A weight of fewer columns than x has reads x's first ones, as nanochat's gates do: the product of its gradient adds to
those columns of dx alone, where autograd would pad it with zeros and add it in a pass over all of dx.

On a GPU. Elsewhere, without gradients and where `torch` is asked for, these are plain products.
"""

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from .dispatch import mode
from .registry import as_rows, without_autocast
from .triton_utils import operator

ADDED = 1 << 17  # elements that a CPU widens and adds at a time, so that the wide copy stays in its cache


@operator(mutates=("dx",))
def _add_input_gradient(dx: Tensor, dy: Tensor, weight: Tensor) -> None:
    """The first c columns of dx (N, C) += dy·weight for dy (N, F), weight (F, c)."""
    dx[:, : weight.size(1)].addmm_(dy, weight)


@functools.cache
def _widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuBLAS adds products of this dtype to float32 on this card: tried once. A failure is warned about."""
    dy, x = (torch.arange(256 * width, device=device).view(256, width).remainder(7) for width in (16, 24))
    # Integers, which float32 adds exactly and 16 bits could not hold.
    total, wanted = torch.full((16, 24), 2.0, device=device), 2 + dy.float().T @ x.float()
    try:
        torch.addmm(total, dy.to(dtype).T, x.to(dtype), out_dtype=total.dtype, out=total)
        wrong = int((total != wanted).sum())
        why = f"{wrong} of {total.numel()} sums were wrong" if wrong else ""
    except (RuntimeError, TypeError) as problem:
        why = str(problem).splitlines()[0]
    if why:
        warnings.warn(f"kernels: products of {dtype} are added to float32 in a pass of their own: {why}", stacklevel=2)
    return not why


@operator(mutates=("dw",))
def _add_product(dw: Tensor, dy: Tensor, x: Tensor) -> None:
    """dw (F, C) += dyᵀ·x for dy (N, F), x (N, C). Where dw is wider, cuBLAS adds to it itself: no pass over dw besides.

    An operator, because a compiler that sees the sum puts it off to the end, and keeps the product until then.
    """
    wider = dy.is_cuda and dy.dtype != dw.dtype and not torch.version.hip
    # Fake tensors would try nothing, and it would be remembered as tried.
    if wider and (isinstance(dy, FakeTensor) or _widens(dy.device, dy.dtype)):
        torch.addmm(dw, dy.T, x, out_dtype=dw.dtype, out=dw)
        return
    product = dy.T @ x
    rows = ADDED // dw.size(1) + 1 if product.device.type == "cpu" else dw.size(0)
    for total, part in zip(dw.split(rows), product.split(rows)):
        total += part


class _Linears(torch.autograd.Function):
    """tensors: n weights, the first of all columns, and the gradients of the first of them that are kept: to these
    backward adds, and returns none. These weights are of all columns too.
    """

    @staticmethod
    def forward(ctx, x, n, *tensors):
        weights, ctx.kept = tensors[:n], tensors[n:]
        ctx.save_for_backward(x, *weights)
        return _products(x, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, first, *others = ctx.saved_tensors
        gradients = [dy.contiguous() for dy in dys]
        dx = gradients[0] @ first
        for dy, weight in zip(gradients[1:], others):
            _add_input_gradient(dx, dy, weight)
        for kept, dy in zip(ctx.kept, gradients):
            _add_product(kept, dy, x)
        n = len(ctx.kept)
        returned = [dy.mT @ x[:, : weight.size(1)] for dy, weight in zip(gradients[n:], (first, *others)[n:])]
        return dx, None, *[None] * n, *returned, *[None] * n


def _products(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(F.linear(x[..., : weight.size(1)], weight) for weight in weights)


def linears(x: Tensor, *weights: Tensor, gradients: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """x·wᵀ for x (..., C) and every weight w (F, c) in x's dtype, of x's first c columns. Returns a (..., F) for each.

    gradients: float32, for the first weights, which are (F, C), kept by the caller. On a GPU backward adds the weight's
    gradient to it, and gives autograd none; where the products are plain ones, autograd gets it: the caller adds what
    it is given. Raises ValueError where several weights are given and the first has fewer columns, or one whose
    gradient is kept.
    """
    plain = not x.is_cuda or not torch.is_grad_enabled() or mode("*") == "torch"
    if plain or (len(weights) == 1 and not gradients):
        return _products(x, weights)
    return _linears(x, *weights, gradients=gradients)


def _linears(x: Tensor, *weights: Tensor, gradients: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    if any(weight.size(1) != x.size(-1) for weight in weights[: max(1, len(gradients))]):
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(
            f"linears: weights are {shapes}, wanted (F, {x.size(-1)}) for the first and those with gradients"
        )
    with without_autocast(x):
        ys = _Linears.apply(as_rows(x), len(weights), *weights, *gradients)
        return tuple(y.view(*x.shape[:-1], y.size(1)) for y in ys)
