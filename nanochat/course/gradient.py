"""Chapter 6: a gradient by hand."""

import torch

from kernels import rms_norm
from kernels.rms_norm import default_eps
from nanochat.course.chapter import Chapter, attempt, function, table

NAME = "rms_norm_backward"


def picture() -> str:
    """How y = rms_norm(x) at x = (3, 4) moves with x."""
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(rms_norm, x)
    y = rms_norm(x)
    along = (jacobian @ x).abs()  # 0, whose sign is rounding
    rows = [
        [f"y{i + 1}", f"{y[i]:.3f}", *(f"{value:+.3f}" for value in jacobian[i]), f"{along[i]:.3f}"] for i in range(2)
    ]
    return table(["x = (3, 4)", "value", "d/dx1", "d/dx2", "along x"], rows)


def check(answer: str) -> str:
    mine = function(answer, NAME)
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 37, 100, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    rms_norm(x).backward(dy)
    assert x.grad is not None
    found: list = []
    with torch.no_grad():
        failed = attempt(lambda: found.append(mine(x.detach().clone(), dy.clone())), answer)
    if failed:
        return failed
    dx = found[0]
    if not isinstance(dx, torch.Tensor) or dx.shape != x.shape:
        return (
            f"It returns {tuple(dx.shape) if isinstance(dx, torch.Tensor) else type(dx).__name__}, wanted dx (37, 100)."
        )
    error = lambda exact: (torch.linalg.norm(dx - exact) / torch.linalg.norm(exact)).item()
    if error(x.grad) < 1e-9:
        return ""
    if error(x.grad) < 1e-4:
        return (
            f"Nearly: its relative error is {error(x.grad):.0e}. eps is {default_eps(x.dtype):.1e} here (`default_eps` "
            "of float64); or is something computed in float32?"
        )
    inverse = torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + default_eps(x.dtype))
    if error(dy * inverse) < 1e-6:
        return "That treats 1/rms as a constant. It depends on every x of its row too."
    unit = x.detach() * inverse
    if error(inverse * (dy - unit * (dy * unit).sum(-1, keepdim=True))) < 1e-6:
        return "Nearly: rms has a mean in it, so somewhere a sum over C should be a mean."
    whole = torch.rsqrt(x.detach().square().mean())
    if error(whole * (dy - x.detach() * whole * (dy * x.detach() * whole).mean())) < 1e-6:
        return "Each row is a vector of its own: the mean is over its C numbers, not over all of x."
    return (
        f"Its relative error is {error(x.grad):.1e}. dx = dy/rms − x·(…); what does rms do when one x of the row moves?"
    )


CHAPTER = Chapter(
    "A gradient by hand",
    f"Write a file with a function `{NAME}(x, dy)`: from x and the gradient dy of the loss with respect to "
    "y = x / sqrt(mean(x²) + eps), both (N, C) float64 and the mean over a row, it returns dx (N, C), without autograd "
    "(which the check switches off). The answer is the file's path.",
    picture,
    check,
)
