"""No speed for a wrong answer: a contender's results and gradients against the float64 reference, before any timing.

The error of each is relative to the float64 answer, and allowed is what tests/test_ops.py allows, or twice what the
reference itself has in the same dtype, or plain PyTorch where a contender is judged by that. In float64 there is no
room for a large case, so it is checked at the same width with few rows; at full size the answers must be the eager
reference's, within both their errors.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Inputs
from kernels import use
from kernels.probing import copied, directions, relative
from kernels.registry import Case, Op, tensors

ROWS, MATRICES = 1024, 2  # of a case that is checked in float64


@dataclass(frozen=True)
class Verdict:
    """The worst of all results and gradients; why: "" when it passed."""

    error: float
    reference_error: float
    allowed: float
    why: str = ""


def narrow(case: Case) -> Case:
    """The same widths with few rows: one of B, else at most ROWS of N, else MATRICES of K."""
    key, most = ("B", 1) if "B" in case else ("N", ROWS) if "N" in case else ("K", MATRICES)
    return {**case, key: min(case[key], most)}


def answers(op: Op, contender: Contender, inputs: Inputs, upcast: bool = False) -> list[Tensor]:
    """Results, what was updated in place, and gradients."""
    mine = copied(inputs, op.differentiable, upcast)
    grads: list[Tensor] = []
    with use(contender.setting):
        outputs = tensors(contender.call(**mine, **contender.extra(mine)))
        learnt = [output for output in outputs if output.requires_grad]
        if op.differentiable:
            grads = list(torch.autograd.grad(learnt, [mine[name] for name in op.differentiable], directions(learnt)))
    return [output.detach() for output in outputs] + [mine[name] for name in op.mutates] + grads


def allowances(op: Op, dtype: torch.dtype, count: int) -> list[float]:
    """What tests/test_ops.py allows for each of `count` answers, gradients last."""
    of_gradients = 6 * op.tolerance[dtype] + (2e-2 if op.name.startswith("fp8") else 0.0)
    results = count - len(op.differentiable)
    return [op.tolerance[dtype]] * results + [of_gradients] * len(op.differentiable)


class Gate:
    """Of one op, case and dtype: holds the exact and the reference's answers, and judges contenders."""

    def __init__(self, op: Op, inputs: Inputs, dtype: torch.dtype):
        self.op, self.inputs, self.dtype = op, inputs, dtype
        reference = Contender(op.reference)
        self.exact = answers(op, reference, inputs, upcast=True)
        self.reference_errors = [relative(a, b) for a, b in zip(answers(op, reference, inputs), self.exact)]

    def judge(self, contender: Contender) -> Verdict:
        found = answers(self.op, contender, self.inputs)
        errors, worst = self.reference_errors, Verdict(0.0, 0.0, 1.0)
        if contender.plain is not None:
            plain = answers(self.op, Contender(contender.plain), self.inputs)
            errors = [max(usual, relative(a, b)) for usual, a, b in zip(errors, plain, self.exact)]
        if len(found) != len(self.exact):
            return Verdict(0.0, 0.0, 0.0, f"it gives {len(found)} results and gradients, wanted {len(self.exact)}")
        for i, (a, b, usual, allowed) in enumerate(
            zip(found, self.exact, errors, allowances(self.op, self.dtype, len(found)))
        ):
            if a.shape != b.shape:
                return Verdict(0.0, usual, 0.0, f"result {i} is {tuple(a.shape)}, wanted {tuple(b.shape)}")
            error, allowed = relative(a, b), max(allowed, 2 * usual)
            if not error <= allowed:  # a NaN too
                shown = error if math.isfinite(error) else 1e300
                return Verdict(shown, usual, allowed, f"result {i} is off by {error:.2g}, allowed {allowed:.2g}")
            if error / allowed >= worst.error / worst.allowed:
                worst = Verdict(error, usual, allowed)
        return worst


def agreement(op: Op, contender: Contender, inputs: Inputs, usual: list[Tensor], dtype: torch.dtype) -> str:
    """Why a contender's answers at full size are not the eager reference's (`usual`); "" when they are."""
    found = answers(op, contender, inputs)
    for i, (a, b, allowed) in enumerate(zip(found, usual, allowances(op, dtype, len(usual)))):
        # In float32: float64 copies of the largest results would not fit beside them.
        error = ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)).item()
        if not error <= 4 * allowed:
            return f"at full size result {i} is {error:.2g} away from the eager reference's, allowed {4 * allowed:.2g}"
    return ""
