"""The MLP with a squared ReLU: its first half, relu(x·Wᵀ)², and the pair, relu(x·W₁ᵀ)²·W₂ᵀ.

2·N·C·F FLOPs each. As separate passes, relu and square cost a read of (N, F) and a write of it, besides the product's
own write; backward reads and writes it three times more: 4–5% of a bf16 step at d24. In the epilogue of the product
that makes them they cost nothing. Because y = relu(h)², relu(h) = √y: only y is stored, and backward rebuilds dy/dh =
2·√y, in the epilogue of dout·W₂ (the pair), so that dy itself never reaches memory either. Not in float16, where
squares of small activations underflow to zero. The reference keeps y alone as well: autograd of relu and square, also
when compiled, keeps h beside it, 9.7 GB more for 24 layers of d24 at 32,768 tokens.

When it does not pay: the product here is Triton's, not cuBLAS's. It breaks even at 77% of cuBLAS's speed; below, the
compiler's separate passes win. So `auto` takes it only where `python -m kernels tune` has measured that it is faster.
The pair can also be had in Inductor's template, "auto,mlp_relu2=inductor" (inductor_template.py).

How the kernel is made: the usual GEMM. Programs walk over groups of GROUP_M row blocks, so that neighbours share tiles
of both factors in L2; sums in float32; the epilogue acts on them before they are rounded, once.

Source: So et al., Primer, arXiv:2109.08668 (the squared ReLU); modded-nanogpt (the fused epilogue); Triton's matmul
tutorial (the order of programs).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tuned
from .dispatch import Refused, mode, triton_runs
from .inductor_template import template_blocks, template_product
from .linears import _add_product, linears
from .registry import Case, Op, as_rows, check_device, itemsize, randn, register, without_autocast
from .triton_utils import INTERPRETED, cdiv, launch, operator, product_tile, specialized, tl, triton

LEAST_ROWS = 64  # fewer, as in decoding, only read the weight, which cuBLAS splits over more programs than tiles are


class _Relu2(torch.autograd.Function):
    """relu(h)², of which alone is kept for backward."""

    @staticmethod
    def forward(ctx, h):
        y = F.relu(h).square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return dy * (2 * y.sqrt())


def relu2(h: Tensor) -> Tensor:
    return F.relu(h).square() if h.dtype == torch.float16 else _Relu2.apply(h)


def linear_relu2_reference(x: Tensor, weight: Tensor) -> Tensor:
    return relu2(F.linear(x, weight.to(x.dtype)))


def mlp_relu2_reference(x: Tensor, w1: Tensor, w2: Tensor, gradients: Sequence[Tensor] = ()) -> Tensor:
    (h,) = linears(x, w1.to(x.dtype), gradients=gradients[:1])
    return linears(relu2(h), w2.to(x.dtype), gradients=gradients[1:])[0]


# ---- Triton


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, y_ptr, out_ptr, M, N, R,
    TURNED: tl.constexpr, BACKWARD: tl.constexpr, UPCAST: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (M, N) = relu(x·wᵀ)² for w (N, R); BACKWARD: (x·w) times 2·√y, w (R, N) if TURNED. All contiguous, x (M, R).

    A program owns a tile (BLOCK_M, BLOCK_N); GROUP_M tiles down, then one to the right.
    """
    down, right = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * right)
    height = tl.minimum(down - group * GROUP_M, GROUP_M)
    inside = tl.program_id(0) % (GROUP_M * right)
    rows = (group * GROUP_M + inside % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (inside // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = product_tile(x_ptr, w_ptr, rows, cols, M, N, R, False, TURNED, UPCAST, BLOCK_R)
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if BACKWARD:
        total = total * 2.0 * tl.sqrt(tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32))
    else:
        total = tl.where(total < 0, 0.0, total)  # a maximum would drop NaN
        total = total * total
    tl.store(out_ptr + at, total, mask=mask)


def _product(x: Tensor, w: Tensor, y: Tensor | None, turned: bool) -> Tensor:
    """Launches for x (M, R) and w (N, R), or (R, N) when turned; backward where y (M, N) is given."""
    (m, r), n = x.shape, w.size(1 if turned else 0)
    config = tuned.config("linear_relu2", x.dtype, r, x.device)
    out = x.new_empty((m, n))
    grid = (cdiv(m, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"]),)
    launch(
        _product_kernel, grid, x, w, x if y is None else y, out, m, n, r, TURNED=turned, BACKWARD=y is not None,
        UPCAST=INTERPRETED and x.dtype == torch.bfloat16, **config,
    )  # fmt: skip
    return out


@operator()
def _linear_relu2(x: Tensor, weight: Tensor) -> Tensor:
    return _product(x, weight, None, turned=False)


@operator()
def _relu2_backward(dout: Tensor, w2: Tensor, y: Tensor) -> Tensor:
    """(dout·w2) times 2·√y: the gradient of h, for dout (N, C), w2 (C, F), y (N, F)."""
    return _product(dout, w2, y, turned=True)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


@once_differentiable
def _gradients(ctx, dy):
    x, weight, y = ctx.saved_tensors
    dh = dy * (2 * y.sqrt())
    return dh @ weight, dh.mT @ x


_linear_relu2.register_autograd(_gradients, setup_context=_save)


class _Pair(torch.autograd.Function):
    """The pair: y is the only thing of size (N, F) that forward stores, dh the only one that backward makes.

    blocks: of Inductor's template, which is to be the product; empty: ours is. kept: of w1 and w2, or none.
    """

    @staticmethod
    def forward(ctx, x, w1, w2, blocks, *kept):
        y = F.relu(template_product(x, w1.mT, blocks)).square() if blocks else _linear_relu2(x, w1)
        ctx.save_for_backward(x, w1, w2, y)
        ctx.blocks, ctx.kept = blocks, kept
        return y @ w2.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, w1, w2, y = ctx.saved_tensors
        dout, blocks = dout.contiguous(), ctx.blocks
        dh = template_product(dout, w2, blocks) * (2 * y.sqrt()) if blocks else _relu2_backward(dout, w2, y)
        if not ctx.kept:
            return dh @ w1, dh.mT @ x, dout.mT @ y, None
        for kept, dy, of in zip(ctx.kept, (dh, dout), (x, y)):
            _add_product(kept, dy, of)
        return dh @ w1, *[None] * 5


# ---- the public functions


def linear_relu2(x: Tensor, weight: Tensor) -> Tensor:
    """relu(x·weightᵀ)² for x (..., C) and weight (F, C), cast to x's dtype. Returns (..., F) in x's dtype.

    Raises ValueError when the shapes do not fit.
    """
    if weight.ndim != 2 or weight.size(1) != x.size(-1):
        raise ValueError(f"linear_relu2: weight is {tuple(weight.shape)} but x has C={x.size(-1)}, wanted (F, C)")
    check_device("linear_relu2", x, weight=weight)
    if _runs("linear_relu2", x):
        return _linear_relu2_triton(x, weight)
    return linear_relu2_reference(x, weight)


def mlp_relu2(x: Tensor, w1: Tensor, w2: Tensor, gradients: Sequence[Tensor] = ()) -> Tensor:
    """relu(x·w1ᵀ)²·w2ᵀ for x (..., C), w1 (F, C), w2 (E, F), cast to x's dtype. Returns (..., E) in x's dtype.

    gradients: of w1 and w2, where the caller keeps them, as for linears.py.
    Raises ValueError when the shapes do not fit.
    """
    if w1.ndim != 2 or w2.ndim != 2 or w1.size(1) != x.size(-1) or w2.size(1) != w1.size(0):
        raise ValueError(
            f"mlp_relu2: w1 is {tuple(w1.shape)}, w2 {tuple(w2.shape)} but x has C={x.size(-1)}, "
            "wanted (F, C) and (E, F)"
        )
    check_device("mlp_relu2", x, w1=w1, w2=w2)
    if mode("mlp_relu2") == "inductor":
        if _compiles(x):
            return _mlp_relu2_inductor(x, w1, w2, gradients)
    elif _runs("mlp_relu2", x):
        return _mlp_relu2_triton(x, w1, w2, gradients)
    return mlp_relu2_reference(x, w1, w2, gradients)


def _linear_relu2_triton(x: Tensor, weight: Tensor) -> Tensor:
    return _linear_relu2(as_rows(x), weight.to(x.dtype).contiguous()).view(*x.shape[:-1], weight.size(0))


def _mlp_relu2_triton(
    x: Tensor, w1: Tensor, w2: Tensor, gradients: Sequence[Tensor] = (), blocks: tuple[int, ...] = ()
) -> Tensor:
    with without_autocast(x):
        out = _Pair.apply(as_rows(x), w1.to(x.dtype).contiguous(), w2.to(x.dtype).contiguous(), blocks, *gradients)
    return out.view(*x.shape[:-1], w2.size(0))


def _mlp_relu2_inductor(x: Tensor, w1: Tensor, w2: Tensor, gradients: Sequence[Tensor] = ()) -> Tensor:
    blocks = template_blocks("mlp_relu2", x.dtype, specialized(x.size(-1)), x.device)
    return _mlp_relu2_triton(x, w1, w2, gradients, blocks)


def _compiles(x: Tensor) -> bool:
    """Whether torch.compile is at work, for which Inductor's template is asked. Raises Refused where it cannot."""
    if not x.is_cuda or x.dtype == torch.float16:
        raise Refused(
            f"mlp_relu2: Inductor's template is asked for (NANOCHAT_KERNELS or use()), but x is {x.dtype} on "
            f"{x.device.type}, wanted bfloat16 or float32 on cuda"
        )
    return torch.compiler.is_compiling()


def _runs(op: str, x: Tensor) -> bool:
    """As triton_runs, but never in float16, nor unasked for few rows. Raises Refused where Triton is forced."""
    if x.dtype == torch.float16 and mode(op) == "triton":
        raise Refused(f"{op}: Triton is asked for, but x is torch.float16, in which relu² underflows; use bfloat16")
    if x.dtype == torch.float16 or not triton_runs(op, x, x.size(-1)):
        return False
    return mode(op) == "triton" or x.numel() >= LEAST_ROWS * x.size(-1)


def _inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    return dict(
        x=randn((case["N"], case["C"]), dtype, device, 0),
        weight=randn((case["F"], case["C"]), dtype, device, 1, scale=case["C"] ** -0.5),
    )


def _pair_inputs(case: Case, dtype: torch.dtype, device: str) -> dict:
    half = _inputs(case, dtype, device)
    w2 = randn((case["C"], case["F"]), dtype, device, 2, scale=case["F"] ** -0.5)
    return dict(x=half["x"], w1=half["weight"], w2=w2)


CASES = {
    "odd": dict(N=37, C=50, F=70),
    "d4": dict(N=512, C=256, F=1024),
    "d12": dict(N=32 * 2048, C=768, F=3072),
    "d24": dict(N=16 * 2048, C=1536, F=6144),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}

register(
    Op(
        name="linear_relu2",
        fn=linear_relu2,
        reference=linear_relu2_reference,
        inputs=_inputs,
        cases=CASES,
        flops=lambda case: 2 * case["N"] * case["C"] * case["F"],
        bytes=lambda case, dtype: (
            itemsize(dtype) * (case["N"] * case["C"] + case["F"] * case["C"] + case["N"] * case["F"])
        ),
        tolerance=TOLERANCE,
        differentiable=("x", "weight"),
        triton=_linear_relu2_triton,
        size=lambda case: case["C"],
        probe=lambda size: (dict(N=67, C=size, F=72),),
    )
)
register(
    Op(
        name="mlp_relu2",
        fn=mlp_relu2,
        reference=mlp_relu2_reference,
        inputs=_pair_inputs,
        cases=CASES,
        flops=lambda case: 4 * case["N"] * case["C"] * case["F"],
        bytes=lambda case, dtype: itemsize(dtype) * 2 * (case["N"] * case["C"] + case["F"] * case["C"]),
        tolerance=TOLERANCE,
        differentiable=("x", "w1", "w2"),
        triton=_mlp_relu2_triton,
        size=lambda case: case["C"],
        probe=lambda size: (dict(N=67, C=size, F=72),),
    )
)
