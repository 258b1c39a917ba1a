"""nanochat's scaling-law ladder (runs/scaling_laws.sh): at each budget of FLOPs, which depth is best?

For one GPU with the Hub's data; of several GPUs one is used. The smoke run is the same ladder at toy size.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import training
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.plot import curves
from nanochat.lab.table import Value, Values
from nanochat.recipe import RATES

FLOPS = (1e18, 2.15e18, 4.64e18, 1e19)


def run(cell: Values, seed: int, size: Mapping[str, Any]) -> dict[str, Value]:
    flags: dict[str, Any] = {**size, "depth": int(cell["depth"]), "target_flops": float(cell["flops"])}
    flags["device_batch_size"] = size["device_batch_size"] // (2 if int(cell["depth"]) >= 20 else 1)
    with training.base("scaling_laws", seed, **flags) as (_, made):
        counts = made["parameters"]
        scaling = counts["transformer_matrices"] + counts["lm_head"]
        return dict(val_bpb=made["val_bpb"], parameters=scaling, tokens=made["tokens"], spent=made["flops"])


def best(points: list[tuple[float, float, float]]) -> tuple[float, float]:
    """(parameters, tokens) at the bottom of a parabola in log parameters; of the best point where it has none.

    points: (parameters, tokens, loss).
    """
    logs, losses = np.log([n for n, _, _ in points]), [loss for _, _, loss in points]
    lowest = min(points, key=lambda point: point[2])
    if len(points) < 3:
        return lowest[:2]
    a, b, _ = np.polyfit(logs, losses, 2)
    bottom = -b / (2 * a) if a > 0 else np.inf
    if not logs.min() <= bottom <= logs.max():
        return lowest[:2]
    return float(np.exp(bottom)), float(np.exp(np.interp(bottom, logs, np.log([t for _, t, _ in points]))))


def findings(rows: Rows) -> Findings:
    claims, series, ratios = {}, {}, []
    for flops in sorted({float(row["flops"]) for row in rows}):
        there = sorted((row for row in rows if row["flops"] == flops), key=lambda row: float(row["parameters"]))
        points = [(float(row["parameters"]), float(row["tokens"]), float(row["val_bpb"])) for row in there]
        parameters, tokens = best(points)
        ratios.append(tokens / parameters)
        claims[f"{flops:g}: parameters"] = f"{parameters:.3g}"
        claims[f"{flops:g}: ratio"] = f"{tokens / parameters:.1f}"
        series[f"{flops:g} FLOPs"] = [(n, loss, loss, loss) for n, _, loss in points]
    claims["ratio"] = f"{statistics.fmean(ratios):.1f}"
    claims["verdict"] = "held" if 5 <= statistics.fmean(ratios) <= 20 else "refuted"
    picture = curves("One budget of FLOPs, several depths", "scaling parameters", "validation bits per byte", series)
    return Findings(claims, {"budgets.svg": picture})


EXPERIMENT = Experiment(
    question="At each budget of compute, how many parameters, and how many tokens for each of them, are best?",
    hypothesis="The best ratio of tokens to scaling parameters lies near the recipe's 12 at every budget.",
    refuted_by="A mean best ratio below 5 or above 20.",
    metric="validation bits per byte on the Hub's text",
    budget="24 trainings on one H100, about 40 hours (predicted); not run",
    cells=tuple(dict(flops=flops, depth=depth) for flops in FLOPS for depth in (10, 12, 14, 16, 18, 20)),
    seeds=(42,),
    run=run,
    findings=findings,
    size=dict(
        RATES,
        vocab_size=32768,
        data="hub",
        compile="auto",
        device_batch_size=32,
        target_param_data_ratio=12.0,
        eval_tokens=100 * 2**19,
    ),
    smoke=dict(
        vocab_size=512,
        aspect_ratio=16,
        head_dim=16,
        max_seq_len=32,
        window_pattern="L",
        device_batch_size=2,
        total_batch_size=64,
        eval_tokens=64,
        weight_decay=0.0,
    ),
    smoke_cells=tuple(dict(flops=flops, depth=d) for flops in (3e7,) for d in (1, 2, 3)),
)
