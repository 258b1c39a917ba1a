"""Weights as decoding on a CPU multiplies with them, each in memory once: as they are, or rounded to int8 by rows.

A decode step reads every weight, and one of a small model does little else: int8 is half the bytes of bfloat16. A row
of a matrix (an output channel) or of a table (a token) is divided by a scale of its own, so that its largest entry is
127, and rounded (LLM.int8(), arXiv:2208.07339, has the same vectors).

- One row of activations: they stay as they are, and compiled code turns the weights to float32 as it reads them.
- Several: they are rounded to int8 too, each row by its own scale, and multiplied as integers (VNNI or AMX, by oneDNN):
  exactly, so that what a row gives does not depend on its company. Where that is slower than turning the weights back,
  they are turned back, a little at a time.

Where many rows are to be decoded and the compute dtype's own products are faster (AMX has them), matrices stay in it
and only tables are rounded. `fastest_product` measures which it is when an engine is made.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.hardware import fastest

HELP = "int8: round the weights to 8 bits, on a CPU: less memory, faster (default: in the compute dtype)"
LARGEST = 127
TRIES = 30  # of each product: the machine may be busy with something else
ROWS = 2048  # of a matrix or table that are in float32 or turned back at a time


class Dense(nn.Module):
    """x·weightᵀ for x (B, K), weight (N, K) in x's dtype.

    pack: for several rows in bfloat16, whose products oneDNN then has ready in its own layout, eagerly and compiled. It
    is a copy: one row read from it takes 1.2 to 1.7 times as long, and several read from `weight` twice as long.
    """

    def __init__(self, weight: Tensor, pack: bool):
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), False)
        packs = pack and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
        self.packed = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(self.weight), False) if packs else None

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        if self.packed is not None and x.size(0) > 1:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "relu" if relu else "none", [], "")
        one = torch.compiler.is_compiling() and x.size(0) == 1
        y = one_row(x, self.weight).to(x.dtype) if one else F.linear(x, self.weight)
        return F.relu(y) if relu else y

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """other + x·weightᵀ."""
        if torch.compiler.is_compiling() or self.packed is None or x.size(0) == 1:
            return other + self(x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, None, "add")


class Rounded(nn.Module):
    """int8 `weight`, a row of which times its float32 `scale` is meant. Whoever casts the model does not mean these."""

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.weight, self.scale = nn.Parameter(weight, False), nn.Parameter(scale, False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Rounded":
        return self


class Int8(Rounded):
    """x·(weight·scale)ᵀ for x (…, K), weight (N, K) int8, scale (N,) float32; in x's dtype.

    integers: whether several rows are multiplied as integers.
    """

    def __init__(self, weight: Tensor, scale: Tensor, integers: bool):
        super().__init__(weight, scale)
        self.integers = integers

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        rows = x.flatten(0, -2)  # (B, K)
        if rows.size(0) == 1:
            y = self._one(rows) * self.scale
        elif self.integers:
            whole, size = quantized(rows)
            y = torch._int_mm(whole, self.weight.t()).float() * size * self.scale
        else:
            parts = zip(self.weight.split(ROWS), self.scale.split(ROWS))
            y = torch.cat([F.linear(rows, (w * s[:, None]).to(x.dtype)) for w, s in parts], 1)
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return F.relu(y) if relu else y

    def _one(self, x: Tensor) -> Tensor:
        """(1, N) float32 of x (1, K), without the scale."""
        if torch.compiler.is_compiling():
            return one_row(x, self.weight)
        return torch.ops.aten._weight_int8pack_mm(x.float(), self.weight, torch.ones_like(self.scale))

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return other + self(x)


class Int8Table(Rounded):
    """Rows of weight (V, C) int8, times scale (V,), by token; in `dtype`. (GPT.embedded takes `weight` alone: its norm
    does not see a scale.)
    """

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype):
        super().__init__(weight, scale)
        self.dtype = dtype

    def forward(self, idx: Tensor) -> Tensor:
        return (self.weight[idx] * self.scale[idx][..., None]).to(self.dtype)


class MLP(nn.Module):
    """The block's, of matrices of these kinds."""

    fp8 = False  # as of gpt.py's, in training

    def __init__(self, c_fc: nn.Module, c_proj: nn.Module):
        super().__init__()
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, h: Tensor) -> Tensor:
        hidden = self.c_fc(h, relu=True)
        return self.c_proj(hidden * hidden)


def one_row(x: Tensor, weight: Tensor) -> Tensor:
    """x·weightᵀ in float32 for x (1, K), weight (N, K), as a loop that the compiler writes: one pass over the weight.

    x is written out first. The compiler would make it anew for each of the N sums, a norm and all: twice the time.
    """
    from torch._inductor import inductor_prims  # here, where it is traced: its import takes seconds

    x = inductor_prims.force_stride_order(x.float(), (x.size(1), 1))
    return (x * weight).sum(-1)[None]


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 of x's shape (N, K), scale (N, 1) float32), x ≈ int8·scale."""
    scale = x.abs().amax(-1, True).float().clamp_min(1e-30) / LARGEST
    return (x / scale).round().to(torch.int8), scale


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantized` of a large (N, K), its scale (N,): a few rows at a time, so that little is there twice."""
    whole, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(weight.size(0))
    for part, into, of in zip(weight.split(ROWS), whole.split(ROWS), scale.split(ROWS)):
        made, size = quantized(part)
        into.copy_(made), of.copy_(size[:, 0])
    return whole, scale


def check(weights: str, device: torch.device) -> None:
    """Raises UserError for words that --weights does not know, and for int8 where it would not pay."""
    if weights not in ("", "int8"):
        raise UserError(f"--weights is {weights!r}, wanted int8, or nothing to keep them in the compute dtype")
    if weights and device.type != "cpu":
        raise UserError(
            f"--weights int8 is for CPUs, and this is {device.type}: leave it out or give --device-type cpu"
        )


def joined(linears: Sequence[Any], gate: Tensor | None, pack: bool) -> Dense | Int8:
    """Matrices of one input, one below the other, as one, and `gate`; theirs become views of it."""
    rest = [] if gate is None else [gate]
    if isinstance(linears[0], Int8):
        weights, scales = zip(*((each.weight, each.scale) for each in linears), *map(rounded, rest))
        whole: Dense | Int8 = Int8(torch.cat(weights), torch.cat(scales), linears[0].integers)
    else:
        whole = Dense(torch.cat([linear.weight.detach() for linear in linears] + rest), pack)
    start = 0
    for linear in linears:
        rows = slice(start, start + linear.weight.size(0))
        linear.weight = nn.Parameter(whole.weight[rows], False)
        if isinstance(whole, Int8):
            linear.scale = nn.Parameter(whole.scale[rows], False)
        start = rows.stop
    return whole


def alone(linear: Any, pack: bool) -> Dense | Int8:
    """A matrix of a model, without a copy."""
    return linear if isinstance(linear, Int8) else Dense(linear.weight, pack)


def quantized_before(model: GPT) -> bool:
    return isinstance(model.transformer["wte"], Int8Table)


@torch.no_grad()
def quantize(model: GPT, rows: int) -> None:
    """Rounds a model's tables and, where it pays, matrices to int8, in place; the gates, which are small, stay. It
    answers as before, and cannot be trained. rows: how many are decoded at a time, at most.
    """
    product = fastest_product(rows, model.config.n_embd, model.dtype)

    def of(linear: nn.Linear) -> Int8:
        return Int8(*rounded(linear.weight), product == "integers")

    if product != "unrounded":
        for block in model.transformer["h"]:
            for name in ("c_q", "c_k", "c_v", "c_proj"):
                setattr(block.attn, name, of(getattr(block.attn, name)))
            block.mlp = MLP(of(block.mlp.c_fc), of(block.mlp.c_proj))
        model.lm_head = of(model.lm_head)  # type: ignore[assignment]
    for tables in (model.transformer, model.value_embeds):
        for name, table in tables.items():
            if isinstance(table, nn.Embedding):
                tables[name] = Int8Table(*rounded(table.weight), model.dtype)


@torch.inference_mode()
def fastest_product(rows: int, width: int, dtype: torch.dtype) -> str:
    """How so many rows are multiplied fastest on this machine: "integers", "turned back" or, with weights of the
    compute dtype, "unrounded".

    The first must win clearly over the second, which is more exact, and the third over both, as it is four times the
    memory (two layouts of two bytes); one row is never multiplied faster by more bytes. Of the first the product alone
    is measured: compiled code rounds rows on the way. Where the processor has no products of integers, they are slower
    by far.
    """
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn((2 * ROWS, width), generator=draw)  # small ones would measure the cost of starting operations
    x = torch.randn((max(rows, 2), width), generator=draw).to(dtype)
    weight, scale = rounded(matrix)
    taken, _ = quantized(x)
    turned, plain = Int8(weight, scale, False), Dense(matrix.to(dtype), pack=True)
    whole, back = fastest(lambda: torch._int_mm(taken, weight.t()), TRIES), fastest(lambda: turned(x), TRIES)
    if rows > 1 and fastest(lambda: plain(x), TRIES) < 0.8 * min(whole, back):
        return "unrounded"
    return "integers" if whole < 0.8 * back else "turned back"
