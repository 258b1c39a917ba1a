"""The critical batch: how steps and tokens to a target loss depend on the batch."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import training
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.estimate import Interval, by_seed, formatted, of_groups, ratio
from nanochat.lab.plot import curves
from nanochat.lab.table import Value, Values

WINDOW = 8192  # tokens that the training loss is averaged over; a step at least
FIRST, SECOND = (4096, 2048, 1024, 512, 256), (8192, 16384)  # as declared first; and after that table was known


def run(cell: Values, seed: int, size: Mapping[str, Any]) -> dict[str, Value]:
    """Steps until the mean training loss of the last WINDOW tokens is at the target; −1 where it never is."""
    batch, target = int(cell["batch"]), size["target"]
    flags = {key: value for key, value in size.items() if key not in ("target", "most", "least")}
    steps, rows = size["least"] + size["most"] // batch, max(1, batch // flags["max_seq_len"])
    with training.base(
        "batch_size", seed, num_iterations=steps, total_batch_size=batch, device_batch_size=min(rows, 8),
        warmdown_ratio=0.0, weight_decay=0.0, **flags,
    ) as (made, _):  # fmt: skip
        losses = training.losses(made)
    reached = steps_to(losses, target, max(1, WINDOW // batch))
    return dict(steps=reached, tokens=reached * batch if reached > 0 else -1, last_loss=statistics.fmean(losses[-4:]))


def steps_to(losses: Sequence[float], target: float, width: int) -> int:
    for step in range(1, len(losses) + 1):
        if (step >= width or step == len(losses)) and statistics.fmean(losses[max(0, step - width) : step]) <= target:
            return step
    return -1


def critical(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(least steps, critical batch) of S = S_min · (1 + B_crit / B), least squares of log S over both."""
    batch, steps = (np.array(column) for column in zip(*points))
    tries = np.exp(np.linspace(np.log(batch.min() / 16), np.log(batch.max() * 16), 400))
    errors = np.var(np.log(steps) - np.log1p(tries[:, None] / batch), axis=1)  # (400,)
    best = float(tries[int(np.argmin(errors))])
    return float(np.exp(np.mean(np.log(steps) - np.log1p(best / batch)))), best


def fits(batches: Sequence[int], groups: Sequence[Sequence[float]]) -> tuple[Interval, Interval]:
    """Least steps and critical batch, with what the seeds leave unknown. groups: the steps of each batch's seeds."""
    pairs = lambda drawn: [(batch, value) for batch, group in zip(batches, drawn) for value in group]
    return tuple(of_groups(groups, lambda drawn, i=i: critical(pairs(drawn))[i]) for i in (0, 1))  # type: ignore


def findings(rows: Rows) -> Findings:
    reached = [row for row in rows if int(row["steps"]) > 0]
    batches = sorted({int(row["batch"]) for row in reached})
    groups = [[float(row["steps"]) for row in reached if row["batch"] == batch] for batch in batches]
    s_min, b_crit = fits(batches, groups)
    declared = [batch for batch in batches if batch not in SECOND]
    _, first = fits(declared, groups[: len(declared)])
    mean = {batch: statistics.fmean(group) for batch, group in zip(batches, groups)}
    tokens = {batch: batch * steps for batch, steps in mean.items()}
    claims = {f"steps at {batch}": f"{steps:.0f}" for batch, steps in mean.items()}
    claims |= {f"tokens at {batch}": f"{value:,.0f}" for batch, value in tokens.items()}
    by_batch = lambda what: {batch: by_seed(reached, dict(batch=batch), what) for batch in batches}
    spent, took = by_batch("tokens"), by_batch("steps")
    for batch in batches[1:]:  # FLOPs of a token are the same: what a batch wastes is its tokens
        claims[f"compute at {batch}"] = formatted(ratio(spent[batches[0]], spent[batch]), ".2f")
        claims[f"saved at {batch}"] = formatted(ratio(took[batches[0]], took[batch]), ".1f")
        claims[f"spent at {batch}"] = formatted(ratio(spent[batch], spent[batches[0]]), ".1f")
    inside = lambda interval, tried: "held" if tried[0] < interval[1] and interval[2] < tried[-1] else "refuted"
    misses = [abs(mean[batch] / (s_min[0] * (1 + b_crit[0] / batch)) - 1) for batch in batches]
    claims |= {
        "critical batch": formatted(b_crit, ",.0f"),
        "critical batch, first": formatted(first, ",.0f"),
        "least steps": formatted(s_min, ",.0f"),
        "missed": str(len(rows) - len(reached)),
        "largest miss of the fit": f"{max(misses):.0%}",
        "verdict": inside(first, declared),
        "second verdict": inside(b_crit, batches),
    }
    point = lambda batch, scale: (
        float(batch),
        mean[batch] * scale,
        *(f(groups[batches.index(batch)]) * scale for f in (min, max)),
    )
    least, best = s_min[0], b_crit[0]
    fitted = [(float(batch), least * (1 + best / batch), *2 * (least * (1 + best / batch),)) for batch in batches]
    drawn = {"measured (lowest to highest seed)": [point(batch, 1.0) for batch in batches], "fit": fitted}
    picture = curves("Steps to the target loss", "tokens of a batch", "steps", drawn, log_y=True)
    return Findings(claims, {"steps.svg": picture})


EXPERIMENT = Experiment(
    question="Up to which batch size do fewer steps pay for more tokens?",
    hypothesis="Steps to a target loss follow S = S_min (1 + B_crit / B) (McCandlish et al., arXiv:1812.06162), with "
    "the critical batch inside the range of batches tried. Declared second, knowing of 256 to 4,096 tokens that the "
    "fit puts it near 3,800: with 8,192 and 16,384 tokens too its interval lies inside the range.",
    refuted_by="An interval of the critical batch that reaches beyond the smallest or the largest batch tried; second: "
    "the same of all seven batches. A batch that misses the target is left out of the fit, and said.",
    metric="steps until the mean training loss of the last 8,192 tokens is at most the target; learning "
    "rates constant and scaled with the root of the batch, as the recipe does",
    budget="10 trainings of 5 to 15 s on one core, and 4 of 1 to 2 minutes; two seeds",
    cells=tuple(dict(batch=batch) for batch in FIRST + SECOND),
    seeds=(1, 2),
    run=run,
    findings=findings,
    size=dict(
        depth=2,
        aspect_ratio=32,
        head_dim=32,
        max_seq_len=128,
        window_pattern="L",
        eval_tokens=1024,
        target=2.6,
        least=70,  # steps, and on top of them `most` tokens
        most=80_000,
    ),
    smoke=dict(
        depth=2,
        aspect_ratio=16,
        head_dim=16,
        max_seq_len=32,
        window_pattern="L",
        eval_tokens=64,
        target=9.0,
        least=2,
        most=64,
    ),
    smoke_cells=tuple(dict(batch=batch) for batch in (64, 32)),
)
