"""Every trick of the model and of the optimizer, each off alone."""

from collections.abc import Mapping
from typing import Any

from experiments import training
from experiments.ablations.paths import ADAMW, TRICKS, WHOLE, without
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.estimate import Interval, by_seed, formatted, multiplier, paired
from nanochat.lab.plot import forest
from nanochat.lab.table import Value, Values

METRIC, STEPS = "val_bpb", 100
LENGTHS = (35, 50, 70, 100, 140)  # of the baseline: what a loss costs in compute
SMOKED = ("QK norm", "Muon (AdamW, 0.01)")


def at(trick: str, steps: int = STEPS) -> Values:
    return dict(trick=trick, steps=steps)


def run(cell: Values, seed: int, size: Mapping[str, Any]) -> dict[str, Value]:
    trick, steps = str(cell["trick"]), int(cell["steps"])
    with (
        without(trick) as more,
        training.base("ablations", seed, **{**size, "num_iterations": steps, **more}) as (_, made),
    ):
        return dict(val_bpb=made["val_bpb"], train_loss=made["train_loss"], flops=made["flops"])


def effects(rows: Rows) -> dict[str, tuple[Interval, Interval]]:
    """{trick: (bits per byte more without it, compute multiplier)}, largest first."""
    whole: Values = dict(trick=WHOLE)
    steps = max(int(row["steps"]) for row in rows if row["trick"] != WHOLE)
    baseline = by_seed(rows, {**whole, "steps": steps}, METRIC)
    curves = {
        seed: [
            (float(row["flops"]), float(row[METRIC])) for row in rows if row["trick"] == WHOLE and row["seed"] == seed
        ]
        for seed in baseline
    }
    found = {}
    for trick in dict.fromkeys(str(row["trick"]) for row in rows):
        if trick == WHOLE:
            continue
        losses = by_seed(rows, dict(trick=trick), METRIC)
        flops = next(float(row["flops"]) for row in rows if row["trick"] == trick)
        found[trick] = (paired(losses, baseline), multiplier(curves, flops, losses))
    return dict(sorted(found.items(), key=lambda one: -one[1][0][0]))


def findings(rows: Rows) -> Findings:
    found = effects(rows)
    claims = {}
    for trick, (effect, factor) in found.items():
        claims[trick] = formatted(effect)
        claims[f"{trick}: compute"] = formatted(factor, ".2f")
    for length in {int(row["steps"]) for row in rows if row["trick"] == WHOLE}:
        whole = by_seed(rows, at(WHOLE, length), METRIC).values()
        claims[f"baseline at {length}"] = f"{min(whole):.3f} to {max(whole):.3f}"
    rates = [trick for trick in found if trick in ADAMW]
    best = min(rates, key=lambda trick: found[trick][0][0])
    others = [trick for trick in found if trick not in ADAMW]
    clear = [trick for trick in others if found[trick][0][1] > 0]
    harmful = [trick for trick in others if found[trick][0][2] < 0]
    largest = max([*others, best], key=lambda trick: found[trick][0][0])
    held = largest == best and len(clear) <= len(others) / 2
    claims |= {
        "best AdamW": best,
        "largest": largest,
        "tricks": str(len(others)),
        "comparisons": str(len(found)),
        "clear": str(len(clear)),
        "clear ones": ", ".join(clear) or "none",
        "harmful": ", ".join(harmful) or "none",
        "verdict": "held" if held else "refuted",
    }
    title = "bits per byte lost without a trick (95% interval, paired by seed)"
    shown = [(trick, effect) for trick, (effect, _) in found.items() if trick not in ADAMW or trick == best]
    return Findings(claims, {"effects.svg": forest(title, shown)})


EXPERIMENT = Experiment(
    question="What is each trick of the model and of the optimizer worth, taken off alone, in a model of this size?",
    hypothesis="Muon is worth the most, even against the best of three rates of AdamW; of the others at most half "
    "help "
    "by more than the noise of the seeds.",
    refuted_by="Another trick whose removal costs more than Muon's, or more than half of the others with an "
    "interval above 0.",
    metric="validation bits per byte, without minus with, paired by seed; and compute multipliers from the "
    "baseline's "
    "own curve of loss against FLOPs",
    budget="72 trainings of 2 to 8 s on one core",
    cells=(
        *(at(WHOLE, steps) for steps in LENGTHS),
        *(at(trick) for trick in TRICKS),
    ),
    seeds=(1, 2, 3),
    run=run,
    findings=findings,
    size=dict(
        depth=3,
        aspect_ratio=21,
        head_dim=32,
        max_seq_len=256,
        window_pattern="SSL",
        device_batch_size=2,
        total_batch_size=512,
        eval_tokens=16384,
        weight_decay=0.02,
    ),
    smoke=dict(
        depth=2,
        aspect_ratio=16,
        head_dim=16,
        max_seq_len=32,
        device_batch_size=2,
        total_batch_size=64,
        eval_tokens=64,
        weight_decay=0.02,
    ),
    smoke_cells=(
        *(at(WHOLE, steps) for steps in (1, 3)),
        *(at(trick, 3) for trick in SMOKED),
    ),
)
