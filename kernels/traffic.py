"""What kernels really move and multiply, counted while Triton's interpreter runs them (TRITON_INTERPRET=1).

Every load and store that is not masked out counts its bytes, every dot its 2·M·N·K: what a kernel asks the memory
system for, before any cache. Against the least that must move (`Op.bytes`) it shows what a kernel reads twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .dispatch import use
from .registry import Case, Op, tensors
from .triton_utils import INTERPRETED


@dataclass
class Traffic:
    read: int = 0  # bytes
    written: int = 0
    flops: int = 0  # of dots


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts what the kernels launched inside move. Raises RuntimeError outside the interpreter."""
    if not INTERPRETED:
        raise RuntimeError("kernels.traffic: counting needs TRITON_INTERPRET=1, set before Python starts")
    from triton.runtime.interpreter import InterpreterBuilder

    count, before = Traffic(), {}

    def watch(name: str, note: Any) -> None:
        inner = before[name] = getattr(InterpreterBuilder, name)

        def watched(self: Any, *args: Any) -> Any:
            note(*args)
            return inner(self, *args)

        setattr(InterpreterBuilder, name, watched)

    def bytes_of(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def load(pointers: Any, mask: Any, *rest: Any) -> None:
        count.read += bytes_of(pointers, mask)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
        count.written += bytes_of(pointers, mask)

    def dot(a: Any, b: Any, *rest: Any) -> None:
        count.flops += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]

    watch("create_masked_load", load)
    watch("create_masked_store", store)
    watch("create_dot", dot)
    try:
        yield count
    finally:
        for name, inner in before.items():
            setattr(InterpreterBuilder, name, inner)


def of_op(op: Op, case: Case, dtype: torch.dtype) -> tuple[Traffic, Traffic]:
    """(forward, backward) of an op's Triton kernels."""
    inputs = op.inputs(case, dtype, "cpu")
    with use(f"torch,{op.name}=triton"), torch.enable_grad():
        for name in op.differentiable:
            inputs[name].requires_grad_()
        with counting() as forward:
            result = op.fn(**inputs)
        with counting() as backward:
            if op.differentiable:
                outputs = [output for output in tensors(result) if output.requires_grad]
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return forward, backward
