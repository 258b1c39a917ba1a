"""The guarded import of Triton, how a kernel is launched and becomes a PyTorch operator; the loop of products. A leaf.

Every op's file imports `triton` and `tl` from here, so that it loads without Triton too (Windows, macOS). A launcher is
a plain function that allocates its results and calls `launch`; `@operator` makes it a PyTorch operator whose shape
function is the launcher itself, run on fake tensors, where `launch` does nothing. On meta tensors inside `capture()`,
launches are recorded instead of run: that is how kernels are compiled for real cards, at real shapes, without one
(targets.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import custom_op

try:
    import triton
    import triton.language as tl

    INSTALLED = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1, read when Python started
except ImportError:
    INSTALLED = INTERPRETED = False

    class _Missing:
        """Stands for Triton where there is none: decorators give the function back, names give themselves."""

        def __getattr__(self, name: str) -> "_Missing":
            return self

        def __call__(self, value: Any = None, **_: Any) -> Any:
            return value if callable(value) else self

    triton = tl = _Missing()

# Of our PyTorch operators: "kernels" in the repository, "nanochat_kernels" where the ops are installed by themselves:
# both can be imported in one process.
NAMESPACE = __package__.partition(".")[0]


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its grid, positional and keyword arguments (tensors on meta)."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


_captured: list[Launch] | None = None


@contextmanager
def capture() -> Iterator[list[Launch]]:
    """Records launches on meta and fake tensors, in order, instead of dropping them."""
    global _captured
    before, _captured = _captured, []
    try:
        yield _captured
    finally:
        _captured = before


def capturing() -> bool:
    return _captured is not None


def launch(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants) on the first tensor's device; nothing for an empty grid or fake tensors."""
    constants.setdefault("enable_fp_fusion", True)  # x·y + z rounds once; said aloud because Triton's default changes
    first = next(arg for arg in args if isinstance(arg, Tensor))
    if first.is_meta or isinstance(first, FakeTensor):
        if _captured is not None:
            _captured.append(Launch(kernel, tuple(grid), args, constants))
        return
    if 0 in grid:
        return
    if first.is_cuda:
        with torch.cuda.device(first.device):
            kernel[tuple(grid)](*args, **constants)
    else:
        kernel[tuple(grid)](*args, **constants)


def operator(mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Registers a launcher as the PyTorch operator NAMESPACE::<its name>, with itself as the shape function.

    Autograd is added with the result's `register_autograd`. A custom operator and not a `triton_op`, because that
    needs a GPU driver to be traced or checked.
    """

    def register(launcher: Callable[..., Any]) -> Any:
        name = f"{NAMESPACE}::{launcher.__name__.strip('_')}"
        op = custom_op(name, launcher, mutates_args=tuple(mutates))
        op.register_fake(launcher)
        return op

    return register


@triton.jit
def product_tile(
    x_ptr, w_ptr, rows, cols, M, N, R, X_TURNED: tl.constexpr, W_TURNED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(rows, cols) of X·Wᵀ in float32, for what follows in a kernel; X and W as in `_factor`, contiguous."""
    total = tl.zeros((rows.shape[0], cols.shape[0]), dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        x, w = _factor(x_ptr, rows, r, M, R, X_TURNED), _factor(w_ptr, cols, r, N, R, W_TURNED).trans()
        if UPCAST:  # the interpreter multiplies bfloat16 wrongly
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")
    return total


@triton.jit
def _factor(ptr, rows, r, M, R, TURNED: tl.constexpr):
    """(rows, r) of a matrix (M, R), or (R, M) if TURNED."""
    if TURNED:
        at, mask = r.to(tl.int64)[:, None] * M + rows[None, :], (r < R)[:, None] & (rows < M)[None, :]
        return tl.load(ptr + at, mask=mask, other=0.0).trans()
    at, mask = rows.to(tl.int64)[:, None] * R + r[None, :], (rows < M)[:, None] & (r < R)[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def chunk_ranges(start: int, end: int, longest: int, unit: int = 1) -> list[tuple[int, int]]:
    """From start to end in equal chunks, (first, end) each, none longer than `longest`: a power of two of them, but
    for those that would be empty. With a `unit`, of which `longest` is a multiple, all but the last are of one too.

    For loops that `torch.compile` unrolls: where sizes change, it traces one graph for each number of chunks.
    """
    count = 1
    while count * longest < end - start:
        count *= 2
    step = cdiv(cdiv(end - start, count), unit) * unit
    firsts = [start + part * step for part in range(count) if part * step < end - start]
    return [(first, min(first + step, end)) for first in firsts]


def power_of_two(n: int) -> int:
    """The least power of two that is at least n. By comparing, so that a size that changes under compilation may."""
    power = 1
    while power < n:
        power *= 2
    return power


def specialized(n: int) -> int:
    """A size as a constant, for what `torch.compile` asks Python while it traces; another size is traced anew."""
    return index(n)


def programs(device: torch.device) -> int:
    """How many programs a persistent kernel starts: a few for each of the device's multiprocessors."""
    if device.type == "cuda":
        return 4 * torch.cuda.get_device_properties(device).multi_processor_count
    return 4 * 132 if device.type == "meta" else 4  # an H100's, for the compiler; few, for the interpreter
