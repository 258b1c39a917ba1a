"""The registry of operations: one `Op` per public function, read by tests, benchmarks and static reports.

An op's file ends with `register(Op(...))`, by which it is tested, compiled for every target, benchmarked and plotted;
CONTRIBUTING.md has the few other places that name it. This module is a leaf: it imports torch and nothing of ours.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Case = Mapping[str, int]


@dataclass(frozen=True)
class Op:
    """One operation and everything that is needed to check and measure it.

    `inputs(case, dtype, device)` gives the keyword arguments of a call; `flops(case)` counts multiply and add as two;
    `bytes(case, dtype)` is the least traffic to and from memory that the forward can do with. `tolerance[dtype]` is
    the largest allowed relative error (norm of the difference over norm of the float64 answer). Public functions that
    update in place name the changed arguments in `mutates`.

    Of an op with Triton kernels, `triton` is the implementation by them, with the arguments of `fn`; `size(case)` is
    what its block sizes are chosen by (dispatch.triton_runs), and `probe(size)` gives the small cases of that size with
    which a card is tried (probing.py): more than one tile, more than one row or token, every kernel it has.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Case, torch.dtype, str], dict[str, Any]]
    cases: Mapping[str, Case]
    flops: Callable[[Case], int]
    bytes: Callable[[Case, torch.dtype], int]
    tolerance: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    )
    differentiable: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    triton: Callable[..., Any] | None = None
    size: Callable[[Case], int] = lambda case: 0
    probe: Callable[[int], tuple[Case, ...]] = lambda size: ()

    def refuses(self, dtype: torch.dtype) -> str:
        """Why nothing is promised of it in a dtype; "" where it has a tolerance."""
        return "" if dtype in self.tolerance else f"{self.name} makes no promise for {str(dtype)[6:]}"


OPS: dict[str, Op] = {}


def register(op: Op) -> None:
    """Adds an op to OPS. Raises ValueError when the name is taken."""
    if op.name in OPS:
        raise ValueError(f"register: the op {op.name!r} is registered twice")
    OPS[op.name] = op


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Where an op of several products runs: all in x's dtype, whatever autocast would make of each."""
    return torch.autocast(x.device.type, enabled=False) if x.device.type in ("cuda", "cpu") else nullcontext()


def tensors(result: Any) -> list[Tensor]:
    """An op's results in a flat list: of none, a tensor, or tuples of them."""
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in tensors(part)]


def as_rows(x: Tensor) -> Tensor:
    """(..., C) as contiguous (N, C), also where C is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.size(-1)).contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums and statistics of a dtype are computed: float64 in its own, all others in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_device(op: str, x: Tensor, **others: Tensor) -> None:
    """Raises ValueError naming the first of `others` that is not where x, the op's first argument, is."""
    for name, tensor in others.items():
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, wanted {x.device}, where the first argument is")


LARGE = 1 << 22  # elements


def randn(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that are the same on every device and run: drawn on the CPU in float32, then moved.

    For a GPU, large ones are drawn there and in their dtype: a CPU takes seconds, and memory that it may not have.
    """
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    if device.startswith("cuda") and math.prod(shape) >= LARGE:
        there = torch.Generator(device).manual_seed(seed)
        return torch.randn(shape, generator=there, device=device, dtype=dtype).mul_(scale)
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cpu") * scale).to(device=device, dtype=dtype)


def randint(high: int, shape: tuple[int, ...], device: str, seed: int = 0) -> Tensor:
    """Integers in [0, high), int64, the same on every device and run."""
    if device == "meta":
        return torch.empty(shape, dtype=torch.int64, device=device)
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(device)


def itemsize(dtype: torch.dtype) -> int:
    """Bytes per element."""
    return torch.empty((), dtype=dtype).element_size()
