"""Chapter 12: a kernel, in Triton's interpreter."""

from functools import partial

import torch

from kernels.triton_utils import INSTALLED, INTERPRETED, cdiv, tl, triton
from nanochat.course.chapter import Chapter, attempt, function
from nanochat.errors import UserError

NAME = "relu2"
N, BLOCK = 22, 8
AROUND = 4096  # elements behind x, and behind the result, where a kernel must leave them alone


@triton.jit
def _owner_kernel(owner_ptr, N, BLOCK: tl.constexpr):
    """A program owns BLOCK elements and writes its number into them."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(owner_ptr + at, tl.program_id(0), mask=at < N)


def need_interpreter() -> None:
    if not INSTALLED:
        raise UserError("this chapter needs Triton, which is not installed: pip install triton (Linux)")
    if not INTERPRETED:
        raise UserError(
            "this chapter runs kernels in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
        )


def picture() -> str:
    """Which program owns which element; + is where a program reaches beyond the end and its mask holds it back."""
    need_interpreter()
    programs = cdiv(N, BLOCK)
    owner = torch.full((programs * BLOCK,), -1, dtype=torch.int32)
    _owner_kernel[(programs,)](owner, N, BLOCK=BLOCK)
    text = "".join("+" if program < 0 else str(int(program)) for program in owner)
    return "\n".join(
        [f"{N} elements, blocks of {BLOCK}: {programs} programs", f"element 0 {text} element {len(text) - 1}"]
    )


def check(answer: str) -> str:
    need_interpreter()
    mine = function(answer, NAME)
    kinds = {type(value).__name__ for value in getattr(mine, "__globals__", {}).values()}
    if not kinds & {"InterpretedFunction", "JITFunction"}:
        return "There is no @triton.jit function in the file: the work is to be a kernel's."
    generator = torch.Generator().manual_seed(0)
    for n in (1000, 1, 4096):
        x = torch.randn(n + AROUND, generator=generator)[:n]
        room = torch.full((n + AROUND,), -7.0)
        if failed := attempt(partial(mine, x, room[:n]), answer):
            return failed
        y = room[:n]
        if not torch.equal(room[n:], torch.full((AROUND,), -7.0)):
            return f"With {n} elements it writes behind the end: where is the mask?"
        if (y == -7.0).all():
            return f"With {n} elements it writes nothing into y."
        if (y == -7.0).any():
            return f"With {n} elements some of y is never written: how many programs does the grid need?"
        if torch.allclose(y, x.relu().square()):
            continue
        if torch.allclose(y, x.relu()):
            return "That is relu; its square is wanted."
        if torch.allclose(y, x.square()):
            return "That is the square also of negative x, where relu gives 0."
        return f"With {n} elements the largest error is {(y - x.relu().square()).abs().max():.3g}."
    return ""


CHAPTER = Chapter(
    "A kernel",
    f"Write a file with a function `{NAME}(x, y)` that launches a Triton kernel of yours, which writes max(x, "
    "0)² into y. "
    "Both are float32 tensors (N,), of any N. The answer is the file's path.",
    picture,
    check,
)
