"""Effects and fits with 95% intervals: paired by seed, as compute multipliers, and of power laws.

An interval of few seeds is Student's t of the paired differences; of a fit, the percentiles of fits to means drawn from
what the seeds leave unknown of them (`of_groups`), the same draws in every call.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.evaluate import intervals
from nanochat.lab.declaration import Rows
from nanochat.lab.table import Values, matches

DRAWS = 1000
Interval = tuple[float, float, float]  # value, low, high


def by_seed(rows: Rows, cell: Values, metric: str) -> dict[int, float]:
    """{seed: value} of the cell's rows."""
    return {int(row["seed"]): float(row[metric]) for row in rows if matches(row, cell)}


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Interval:
    """Mean of one − other over the seeds that both have."""
    return intervals.mean([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def ratio(one: Mapping[int, float], other: Mapping[int, float]) -> Interval:
    """Geometric mean of one / other over the seeds that both have."""
    logs = [math.log(one[seed] / other[seed]) for seed in sorted(one.keys() & other.keys())]
    value, low, high = (math.exp(x) if x < 700 else math.inf for x in intervals.mean(logs))
    return value, low, high


def rate(shares: Sequence[float]) -> Interval:
    """Mean of shares between 0 and 1, one a seed: Student's t, no further than 0 and 1."""
    value, low, high = intervals.mean(shares)
    return value, max(0.0, low), min(1.0, high)


def of_groups(groups: Sequence[Sequence[float]], statistic: Callable[[list[list[float]]], float]) -> Interval:
    """statistic of groups of positive values, a cell's seeds each, with the interval of what the seeds leave unknown.

    Each group is moved by as much as its mean may be off: a share of it, normal, with a deviation that is pooled over
    the groups and is drawn too, since few seeds hardly know it (Gelman et al., Bayesian Data Analysis, 3.2). For one
    group that is Student's t of the logs. (Drawing two or three seeds again with replacement covers far less than 95%.)
    A law that is wrong is not in it. NaN draws are left out. Infinitely wide where no group has two values.
    """
    value = statistic([list(group) for group in groups])
    logs, freedom = [np.log(group) for group in groups], sum(len(group) - 1 for group in groups)
    if not freedom:
        return value, -math.inf, math.inf
    squares, draw = sum(float(((one - one.mean()) ** 2).sum()) for one in logs), np.random.default_rng(0)
    deviations = np.sqrt(squares / draw.chisquare(freedom, (DRAWS, 1)) / [len(group) for group in groups])
    moves = np.exp(deviations * draw.standard_normal(deviations.shape))  # (draws, groups)
    values = np.array([statistic([[v * by for v in group] for group, by in zip(groups, drawn)]) for drawn in moves])
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (2.5, 97.5)) if len(values) else (-math.inf, math.inf)
    return value, float(low), float(high)


# ---- compute multipliers


def compute_for(loss: float, curve: Sequence[tuple[float, float]]) -> float:
    """Compute at which a falling curve of (compute, loss) has this loss: straight in log compute, and beyond its ends
    as its last stretch goes on. NaN where that stretch does not fall.
    """
    curve = sorted(curve)
    i = next((i for i in range(len(curve) - 1) if curve[i + 1][1] <= loss), len(curve) - 2)
    (c0, l0), (c1, l1) = curve[i], curve[i + 1]
    if l0 <= l1:
        return math.nan
    return math.exp(math.log(c0) + (l0 - loss) / (l0 - l1) * (math.log(c1) - math.log(c0)))


def multiplier(
    curves: Mapping[int, Sequence[tuple[float, float]]], compute: float, losses: Mapping[int, float]
) -> Interval:
    """Compute that the baseline needs for a variant's loss, over the variant's: geometric mean over seeds, Student's t.

    curves: the baseline's by seed. Below 1 the variant wastes compute.
    """
    needed = {seed: compute_for(losses[seed], curve) for seed, curve in curves.items() if seed in losses}
    return ratio(needed, dict.fromkeys(needed, compute))


# ---- power laws


@dataclass(frozen=True)
class PowerLaw:
    """loss = floor + scale · x^−exponent."""

    floor: float
    scale: float
    exponent: float

    def __call__(self, x: float) -> float:
        return self.floor + self.scale * x**-self.exponent


def power_law(x: Sequence[float], y: Sequence[float], floor: float | None = None) -> PowerLaw:
    """Least squares in log (y − floor); a floor that is not given is the best of a grid from 0 to below all y."""
    floors = np.array([floor]) if floor is not None else np.linspace(0.0, 0.99 * min(y), 100)
    logs, wanted = np.log(x), np.asarray(y, float)
    left = np.log(wanted - floors[:, None])  # (floors, points)
    away = logs - logs.mean()
    slopes = (left @ away) / (away @ away)
    starts = left.mean(1) - slopes * logs.mean()
    fits = floors[:, None] + np.exp(starts[:, None] + slopes[:, None] * logs)  # (floors, points)
    best = int(np.argmin(((fits - wanted) ** 2).sum(1)))
    return PowerLaw(float(floors[best]), float(np.exp(starts[best])), float(-slopes[best]))


# ---- in words


def formatted(interval: Interval, form: str = "+.4f") -> str:
    """ "+0.0123 (+0.0100 to +0.0146)"; "+0.0123 (one seed)" where there is no interval."""
    value, low, high = interval
    if math.isinf(high):
        return f"{value:{form}} (one seed)"
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
