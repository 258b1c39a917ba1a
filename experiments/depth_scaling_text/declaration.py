"""The forecast of depth_scaling once more, on real text: the Hub's, or a mirror's."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import training
from experiments.depth_scaling import declaration as microworld
from nanochat.data import choose
from nanochat.evaluate.intervals import mean
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.table import Value, Values


def run(cell: Values, seed: int, size: Mapping[str, Any]) -> dict[str, Value]:
    """epochs: how often all text there is was read; 0 of the microworld's, which has no end."""
    found = microworld.measured("depth_scaling_text", cell, seed, size)
    return dict(found, epochs=int(found["tokens"]) / tokens_there() if size["data"] == "hub" else 0.0)


@functools.cache
def tokens_there() -> int:
    """Of the training text."""
    text, tokenizer = choose.documents("hub", 0), training.tokenizer(512, "hub")
    return sum(len(tokenizer.encode(one)) for unit in range(text.units("train")) for one in text.load("train", unit))


def findings(rows: Rows) -> Findings:
    found = microworld.findings(rows, Path(__file__).parent)
    epochs = {
        depth: [float(row["epochs"]) for row in rows if row["depth"] == depth] for depth in microworld.by_depth(rows)
    }
    return Findings({**found.claims, **{f"epochs {d}": f"{mean(e)[0]:.2f}" for d, e in epochs.items()}}, found.plots)


EXPERIMENT = Experiment(
    question="Does the loss of small depths predict that of a larger one on real text, of which there is little?",
    hypothesis="A power law in FLOPs with a floor, fitted to depths 2 to 4, forecasts depth 5 within its interval; on "
    "the microworld, whose facts a model begins to recall at some depth, it did not.",
    refuted_by="A mean of depth 5, over its seeds, outside the interval that was committed before it ran.",
    metric="validation bits per byte of the last shard of the mirror: WikiText-2 and Shakespeare; read less than once",
    budget="9 trainings of 1 to 10 s, then 3 of 25 s, on one core",
    cells=microworld.EXPERIMENT.cells,
    held_out=microworld.EXPERIMENT.held_out,
    forecast=microworld.forecast,
    seeds=(1, 2, 3),
    run=run,
    findings=findings,
    size=dict(microworld.EXPERIMENT.size, data="hub"),
    smoke=dict(microworld.EXPERIMENT.smoke, data="embedded"),
    smoke_cells=microworld.EXPERIMENT.smoke_cells,
)
