"""Rows of a table by token, and the gradient of the rows that occur.

    y[n] = weight[tokens[n]],        dweight[v] = Σ dy[n] over all n with tokens[n] = v

Forward is PyTorch's gather: N·C elements read and written. Backward is where time is lost. torch.compile makes a
gradient of the whole table for every call: zeros in float32, the sum by atomic additions, a cast, and another pass to
add it to the gradient of the micro-batch before: 10 to 16 bytes for each of V·C elements, although 32,768 tokens of
text are some 5,300 different ones (counted: WikiText-2 and Shakespeare, V = 32,768). nanochat's d24 has 13 such tables
of 50 M elements, looked up with the same tokens. Here the sum goes straight into `gradient`, a table that the caller
keeps: dy is read once, and only rows that occur are read and written, together about 1.3·N·C elements. Tokens are
sorted first; a compiler sorts once for all tables.

How the kernel is made: equal tokens stand beside each other, in the order of the text. The sum of equal rows is a
product with a matrix of zeros and ones, for which matrix units are there in 16 bits: every term is exact, sums are in
float32. Each run of equal tokens is summed by one program and added once: no atomics, so that the result is bitwise
the same each time, and in bfloat16 a frequent word does not lose its small terms. A product with zeros has a price: a
NaN or an infinity in dy spreads to up to 63 neighbours. And a token that fills a batch is still one program's work.

When it does not pay: small vocabularies, where most rows occur; and it is not measured where it does. The registry's
case, and so the tuner, has no `gradient`: there both ways write a whole table.

Source: summing sorted runs is what torch's own `embedding_dense_backward` does on CUDA in eager mode, and the row-wise
gradients of sparse embeddings in DLRM, arXiv:1906.00091.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tuned
from .dispatch import triton_runs
from .registry import Case, Op, check_device, itemsize, randint, randn, register, wide
from .triton_utils import INTERPRETED, cdiv, launch, operator, tl, triton


def embedding_reference(tokens: Tensor, weight: Tensor, gradient: Tensor | None = None) -> Tensor:
    return F.embedding(tokens, weight) if gradient is None else _Lookup.apply(tokens, weight, gradient, False)


# ---- Triton


@triton.jit
def _embedding_bwd_kernel(
    dy_ptr, sorted_ptr, order_ptr, gradient_ptr, N,
    C: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program owns the runs of equal tokens that begin at its BLOCK_N places, in BLOCK_C columns.

    The last run is followed to its end, however far; places of a run that began before are left to its owner.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    places = start + tl.arange(0, BLOCK_N)
    token = tl.load(sorted_ptr + places, mask=places < N, other=-1)
    before = tl.load(sorted_ptr + places - 1, mask=(places > 0) & (places < N), other=-1)
    begins = token != before  # (BLOCK_N,)
    last = tl.load(sorted_ptr + tl.minimum(start + BLOCK_N, N) - 1)
    least = tl.min(tl.where(begins, token, last), axis=0)
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    more = tl.max(begins.to(tl.int32), axis=0) > 0
    while more:
        at = start + tl.arange(0, BLOCK_N)
        found = tl.load(sorted_ptr + at, mask=at < N, other=-2)
        mine = (found >= least) & (found <= last)
        row = tl.load(order_ptr + at, mask=mine, other=0)
        dy = tl.load(dy_ptr + row[:, None] * C + cols[None, :], mask=mine[:, None] & (cols < C)[None, :], other=0.0)
        if UPCAST:  # the interpreter multiplies bfloat16 wrongly
            dy = dy.to(tl.float32)
        equal = begins[:, None] & (token[:, None] == found[None, :])  # (BLOCK_N, BLOCK_N): run, place
        total = tl.dot(equal.to(dy.dtype), dy, total, input_precision="ieee")
        start += BLOCK_N
        more = tl.load(sorted_ptr + start, mask=start < N, other=-2) == last
    into = token[:, None] * C + cols[None, :]
    mask = begins[:, None] & (cols < C)[None, :]
    tl.store(gradient_ptr + into, tl.load(gradient_ptr + into, mask=mask, other=0.0).to(tl.float32) + total, mask=mask)


@operator(mutates=("gradient",))
def _embedding_backward(gradient: Tensor, ordered: Tensor, order: Tensor, dy: Tensor) -> None:
    """gradient (V, C) += the rows of dy (N, C), whose tokens are `ordered` (N,) once they stand in `order` (N,)."""
    n, c = dy.shape
    config = tuned.config("embedding", dy.dtype, c, dy.device)
    grid = (cdiv(n, config["BLOCK_N"]), cdiv(c, config["BLOCK_C"]))
    upcast = INTERPRETED and dy.dtype == torch.bfloat16
    launch(_embedding_bwd_kernel, grid, dy, ordered, order, gradient, n, C=c, UPCAST=upcast, **config)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight, gradient, fused):
        ctx.save_for_backward(tokens)
        ctx.gradient, ctx.fused, ctx.table = gradient, fused, (weight.shape, weight.dtype)
        if not torch.compiler.is_compiling():
            return F.embedding(tokens, weight)  # which refuses a token below zero
        return weight[tokens]  # read again in backward, which keeps what F.embedding gives

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (tokens,), (shape, dtype) = ctx.saved_tensors, ctx.table
        tokens, dy = tokens.flatten(), dy.reshape(tokens.numel(), shape[1])
        gradient = dy.new_zeros(shape, dtype=dtype) if ctx.gradient is None else ctx.gradient
        if ctx.fused:
            _embedding_backward(gradient, *tokens.sort(stable=True), dy.contiguous())
        else:
            gradient += torch.ops.aten.embedding_dense_backward(dy.to(wide(dtype)), tokens, shape[0], -1, False)
        return None, gradient if ctx.gradient is None else None, None, None


def _embedding_triton(tokens: Tensor, weight: Tensor, gradient: Tensor | None = None) -> Tensor:
    return _Lookup.apply(tokens, weight, gradient, True)


# ---- the public function


def embedding(tokens: Tensor, weight: Tensor, gradient: Tensor | None = None) -> Tensor:
    """weight[tokens] for tokens (…) int64 in [0, V) and weight (V, C). Returns (…, C) in weight's dtype.

    gradient: (V, C) in weight's dtype, contiguous: backward adds weight's gradient to it, in float32 rounded once, and
    gives autograd none; whoever keeps it sets it to zero. Without it, autograd gets a gradient of the whole table.
    Differentiable once, in weight. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    if weight.ndim != 2:
        raise ValueError(f"embedding: weight is {tuple(weight.shape)}, wanted (V, C)")
    if tokens.dtype != torch.int64:
        raise ValueError(f"embedding: tokens are {tokens.dtype}, wanted torch.int64")
    check_device("embedding", tokens, weight=weight)
    if gradient is not None:
        check_device("embedding", tokens, gradient=gradient)
        if gradient.shape != weight.shape or gradient.dtype != weight.dtype or not gradient.is_contiguous():
            raise ValueError(
                f"embedding: gradient is {tuple(gradient.shape)} {gradient.dtype}"
                f"{'' if gradient.is_contiguous() else ', not contiguous'}, wanted contiguous and as weight, "
                f"{tuple(weight.shape)} {weight.dtype}"
            )
    if triton_runs("embedding", weight, weight.size(1)):
        return _embedding_triton(tokens, weight, gradient)
    return embedding_reference(tokens, weight, gradient)


def _inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    # The product of two draws makes small tokens frequent, as text has them.
    draw = [randint(case["V"], (case["N"],), device, seed) for seed in (1, 2)]
    return dict(
        tokens=draw[0] * draw[1] // case["V"],
        weight=randn((case["V"], case["C"]), dtype, device, 0),
    )


register(
    Op(
        name="embedding",
        fn=embedding,
        reference=embedding_reference,
        inputs=_inputs,
        cases={
            "odd": dict(N=331, V=29, C=40),
            "d4": dict(N=512, V=4096, C=256),
            "d12": dict(N=32 * 2048, V=32768, C=768),
            "d24": dict(N=16 * 2048, V=32768, C=1536),
        },
        flops=lambda case: case["N"] * case["C"],  # backward's sums; forward has none
        bytes=lambda case, dtype: 2 * case["N"] * case["C"] * itemsize(dtype) + 8 * case["N"],
        differentiable=("weight",),
        triton=_embedding_triton,
        size=lambda case: case["C"],
        probe=lambda size: (dict(N=331, V=29, C=size),),
    )
)
