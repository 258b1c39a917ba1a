"""How much a score says: 95% intervals of a rate, of a mean over seeds, of a mean of scores, and of the difference of
two models on the same questions, with the exact test of it.

A rate over n questions of one run: `wilson`. The same number from several seeds, or a share for each question: `mean`.
Two models on the same questions: `McNemar`, which looks only at the questions on which they differ.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964  # the normal distribution's 97.5% quantile


def wilson(successes: int, n: int, z: float = Z) -> tuple[float, float]:
    """The 95% interval of a rate (E. B. Wilson, 1927): sensible also near 0 and 1. NaN for n = 0."""
    if n == 0:
        return math.nan, math.nan
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of independent values: Student's t interval (1908). Infinitely wide for a single value."""
    middle, n = statistics.fmean(values), len(values)
    if n < 2:
        return middle, -math.inf, math.inf
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return middle, middle - half, middle + half


def t_quantile(freedom: int) -> float:
    """The t that |T| exceeds in 5% of cases, for so many degrees of freedom."""
    low, high = 0.0, 13.0  # 12.706 for one degree
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, min(freedom, 2000)) < 0.95 else (low, middle)
    return low


def t_within(t: float, freedom: int) -> float:
    """P(|T| ≤ t) for whole degrees of freedom (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    term = total = math.cos(angle) if freedom % 2 else 1.0
    for i in range(2 if freedom % 2 else 1, freedom - 2, 2):
        term *= i / (i + 1) * math.cos(angle) ** 2
        total += term
    if freedom == 1:
        return 2 * angle / math.pi
    return 2 / math.pi * (angle + math.sin(angle) * total) if freedom % 2 else math.sin(angle) * total


def combined(scores: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(mean, low, high) of the mean of independent (score, low, high): the recovered variances of each side are added
    (MOVER; Zou and Donner, Statistics in Medicine 27, 2008). Keeps Wilson's sense near 0 and 1.
    """
    n = len(scores)
    middle = sum(score for score, _, _ in scores) / n
    below = math.sqrt(sum((score - low) ** 2 for score, low, _ in scores)) / n
    above = math.sqrt(sum((high - score) ** 2 for score, _, high in scores)) / n
    return middle, middle - below, middle + above


@dataclass(frozen=True)
class McNemar:
    """Two models, A and B, on the same n questions: how many only A got, and how many only B."""

    n: int
    only_a: int
    only_b: int

    @property
    def difference(self) -> float:
        """A's rate minus B's."""
        return (self.only_a - self.only_b) / self.n

    @property
    def p(self) -> float:
        """Two-sided p of the exact test (McNemar, 1947, as a sign test): were both alike, each question on which they
        differ would be a fair coin's throw.
        """
        discordant, fewer = self.only_a + self.only_b, min(self.only_a, self.only_b)
        ways = tail = 1  # to have none of them, of 2^discordant in all
        for k in range(fewer):
            ways = ways * (discordant - k) // (k + 1)
            tail += ways
        return min(1.0, 2 * tail / 2**discordant)

    @property
    def interval(self) -> tuple[float, float]:
        """95% of the difference: Wald's, after adding half a question to each of the four cells (Agresti and Min,
        Statistics in Medicine 24, 2005). The test is the stricter one where few questions differ: go by its p.
        """
        a, b, n = self.only_a + 0.5, self.only_b + 0.5, self.n + 2
        middle = (a - b) / n
        half = Z * math.sqrt(a + b - (a - b) ** 2 / n) / n
        return max(-1.0, middle - half), min(1.0, middle + half)
