"""Whether an op's kernels give the reference's answer and gradients: what a card is tried with before it is trusted.

Gradients are taken along fixed random directions: the sum of squares of a normed output, say, is constant, and its
gradient is nothing but rounding. Errors are measured against the reference in float64 and may be a few times those of
the reference in the same dtype, and what the op's tolerance allows. They are relative to the exact answer, or, where
that is zero, to numbers of size 1.

Both implementations are called directly, never through `kernels.use()`: another thread may be computing meanwhile. The
tuner and the benchmarks' gate compare in the same way. A leaf.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .registry import OPS, Op, tensors

RATIO = 4  # times the error of PyTorch in the same dtype
CHUNK = 1 << 24  # elements that are compared in float64 at a time: results may be as large as a card's memory allows
LOOSEST = 1e-2  # of an op's tolerance, which for fp8 and for iterations is far larger: their errors are in RATIO


@contextmanager
def training(device: torch.device) -> Iterator[None]:
    """Gradients are recorded and nothing is cast within, whatever the caller's mode is."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def directions(outputs: list[Tensor]) -> list[Tensor]:
    """Random gradients for the outputs, the same for every implementation and dtype."""
    found = []
    for i, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(i)
        found.append(torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype))
    return found


def copied(inputs: Mapping[str, Any], learnt: tuple[str, ...], upcast: bool = False) -> dict[str, Any]:
    """The inputs' own copies, in float64 when upcast; those named in `learnt` want gradients."""
    found = {}
    for key, value in inputs.items():
        if torch.is_tensor(value):
            value = value.detach().clone()
            value = value.double() if upcast and value.is_floating_point() else value
            value = value.requires_grad_(key in learnt)
        elif upcast and isinstance(value, torch.dtype):
            value = torch.float64
        found[key] = value
    return found


def answers(op: Op, call: Callable[..., Any], inputs: Mapping[str, Any], upcast: bool = False) -> list[Tensor]:
    """Of op's inputs through `call`: results, what was updated in place, and gradients, in this order."""
    mine = copied(inputs, op.differentiable, upcast)
    outputs = tensors(call(**mine))
    grads: list[Tensor] = []
    if op.differentiable:
        learnt = [output for output in outputs if output.requires_grad]
        grads = list(torch.autograd.grad(learnt, [mine[name] for name in op.differentiable], directions(learnt)))
    return [output.detach() for output in outputs] + [mine[name] for name in op.mutates] + grads


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the exact answer's, or over 1 per element where that is as good as zero."""
    difference, norm, one = 0.0, 0.0, math.sqrt(exact.numel())
    for a, b in zip(found.reshape(-1).split(CHUNK), exact.reshape(-1).split(CHUNK)):
        b = b.double()
        difference, norm = math.hypot(difference, (a.double() - b).norm().item()), math.hypot(norm, b.norm().item())
    return difference / (norm if norm > 1e-6 * one else one or 1.0)


def tolerances(op: Op, dtype: torch.dtype, count: int) -> list[float]:
    """Of each of `count` answers, gradients last, which pass through more roundings."""
    gradients, usual = len(op.differentiable), min(op.tolerance[dtype], LOOSEST)
    return [2 * usual] * (count - gradients) + [6 * usual] * gradients


def disagreement(op: Op, call: Callable[..., Any], inputs: Mapping[str, Any], dtype: torch.dtype) -> str:
    """What is wrong with the answers of `call`, an implementation of op, to these inputs; "" when they are right."""
    exact = answers(op, op.reference, inputs, upcast=True)
    usual = answers(op, op.reference, inputs)
    found = answers(op, call, inputs)
    for i, (a, b, c, allowed) in enumerate(zip(found, usual, exact, tolerances(op, dtype, len(found)), strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i} is {tuple(a.shape)} {a.dtype}, wanted {tuple(b.shape)} {b.dtype}"
        error, allowed = relative(a, c), RATIO * relative(b, c) + allowed
        if not error <= allowed:  # a NaN too
            return f"result {i} is off by {error:.2g}, allowed {allowed:.2g}"
    return ""


def check(name: str, dtype: torch.dtype, size: int, device: torch.device) -> None:
    """Launches an op's kernels, forward and backward, on small cases of this size. Raises when an answer is wrong."""
    op = OPS[name]
    assert op.triton is not None
    with training(device):
        for case in op.probe(size):
            problem = disagreement(op, op.triton, op.inputs(case, dtype, str(device)), dtype)
            if problem:
                raise RuntimeError(problem)
