"""Chapter 7: what Muon does to a gradient."""

import torch

from kernels import polar_express
from kernels.newton_schulz import POLAR_EXPRESS, QUINTIC
from nanochat.course.chapter import Chapter, near, number, table

SHOWN, ASKED = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001), 0.003


def picture() -> str:
    """Singular values of a matrix, step by step. A diagonal one, whose singular values can be read off."""
    matrix = torch.diag(torch.tensor(SHOWN, dtype=torch.float64))
    scaled = matrix.diagonal() / (1.01 * torch.linalg.matrix_norm(matrix))
    after = [scaled, *(polar_express(matrix, steps=steps).diagonal() for steps in range(1, 6))]
    rows = [
        ["scaled" if i == 0 else f"step {i}", *(f"{value:.3f}" for value in values)] for i, values in enumerate(after)
    ]
    return table(["", *map(str, SHOWN)], rows)


def moved(s: float, coefficients: tuple[tuple[float, float, float], ...]) -> float:
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return s


def check(answer: str) -> str:
    value = number(answer)
    if near(value, moved(ASKED, POLAR_EXPRESS)):
        return ""
    for steps in range(1, 5):
        if near(value, moved(ASKED, POLAR_EXPRESS[:steps])):
            return f"That is after {steps} of the five."
    if near(value, moved(ASKED, (QUINTIC,) * 5)):
        return "That is `newton_schulz`, with one polynomial for all steps. `polar_express` has five."
    if near(value, 1.0, 1e-6):
        return "That is where it would end after many steps. What are five worth?"
    return "X ← aX + (bA + cA²)X with A = XXᵀ: write X = U·diag(s)·Vᵀ, and see what becomes of one s. Then five times."


CHAPTER = Chapter(
    "Muon: a gradient made orthogonal",
    f"After scaling, a gradient has a singular value of {ASKED}. What is it after the five steps of "
    "`polar_express`? Three "
    "digits will do.",
    picture,
    check,
)
