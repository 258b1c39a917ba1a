"""Unique tokens times epochs: where reading the same text again stops paying."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments import training
from nanochat.data.microworld import Documents
from nanochat.evaluate.intervals import mean
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.estimate import by_seed, formatted, multiplier, paired
from nanochat.lab.plot import curves
from nanochat.lab.table import Value, Values

CHARACTERS = 2.3  # of a token of this tokenizer, about: the size of a text is planned in tokens
UNIQUE, EPOCHS = 16_384, (1, 2, 4, 8, 16)  # as declared first
LESS, LONGER = 4_096, (32, 64)  # declared second, when the table of the first was known
FRESH = 0  # epochs of text that is never read twice


def texts(seed: int, split: str, characters: float) -> list[str]:
    source, made, unit = Documents(draw=seed), [], 0
    while characters > 0:
        for text in source.load(split, unit):
            made.append(text)
            characters -= len(text)
            if characters <= 0:
                break
        unit += 1
    return made


def run(cell: Values, seed: int, size: Mapping[str, Any]) -> dict[str, Value]:
    """The text is written to files of one's own, as a user's would be; all cells are validated on the same other
    text."""
    tokens = int(cell["unique"] * max(1, int(cell["epochs"])) * size["scale"])
    unique = tokens if cell["epochs"] == FRESH else int(cell["unique"] * size["scale"])
    flags = {key: value for key, value in size.items() if key != "scale"}
    steps = max(2, tokens // flags["total_batch_size"])
    with TemporaryDirectory() as place:
        for split, count in (("train", unique * 1.05), ("val", 40_000 * size["scale"] + 2000)):
            lines = "".join(json.dumps(dict(text=text)) + "\n" for text in texts(seed, split, count * CHARACTERS))
            Path(place, f"{split}.jsonl").write_text(lines, "utf-8")
        with training.base("data_repetition", seed, text=place, num_iterations=steps, **flags) as (_, made):
            return dict(val_bpb=made["val_bpb"], train_loss=made["train_loss"], flops=made["flops"])


def findings(rows: Rows) -> Findings:
    fresh = {seed: [] for seed in {int(row["seed"]) for row in rows}}  # type: dict[int, list[tuple[float, float]]]
    for row in rows:
        if row["epochs"] in (FRESH, 1):
            fresh[int(row["seed"])].append((float(row["flops"]), float(row["val_bpb"])))
    claims: dict[str, str] = {}
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    best: dict[int, int] = {}
    uniques = sorted({int(row["unique"]) for row in rows if row["epochs"] != FRESH})
    for unique in uniques:
        there = sorted({int(row["epochs"]) for row in rows if row["unique"] == unique and row["epochs"] != FRESH})
        losses = {epochs: by_seed(rows, dict(unique=unique, epochs=epochs), "val_bpb") for epochs in there}
        name = f"{unique:,} unique tokens"
        series[name] = [(float(unique * epochs), *mean(list(one.values()))) for epochs, one in losses.items()]
        for before, epochs in zip(there, there[1:]):
            claims[f"{unique}, {before} to {epochs}"] = formatted(paired(losses[epochs], losses[before]))
            flops = next(float(row["flops"]) for row in rows if row["unique"] == unique and row["epochs"] == epochs)
            claims[f"{unique}, {epochs}: compute"] = formatted(multiplier(fresh, flops, losses[epochs]), ".2f")
        means = {epochs: sum(one.values()) / len(one) for epochs, one in losses.items()}
        best[unique] = min(means, key=lambda epochs: means[epochs])
        claims[f"{unique}: best"] = str(best[unique])
        claims[f"{unique}: best to most"] = formatted(paired(losses[there[-1]], losses[best[unique]]))
        first = min(means.keys() & set(EPOCHS), key=lambda epochs: means[epochs])
        claims[f"{unique}: best of the first"] = str(first)
    lengths = sorted({int(row["unique"]) for row in rows if row["epochs"] in (FRESH, 1)})
    series["never read twice"] = [
        (
            float(one),
            *mean([float(row["val_bpb"]) for row in rows if row["unique"] == one and row["epochs"] in (FRESH, 1)]),
        )
        for one in lengths
    ]
    four = float(claims[f"{UNIQUE}, 4: compute"].split()[0])
    held = four > 0.5 and int(claims[f"{UNIQUE}: best of the first"]) < EPOCHS[-1]
    claims["verdict"] = "held" if held else "refuted"
    if LESS in best:
        held = best[LESS] <= best[UNIQUE] < LONGER[-1]
        claims["second verdict"] = "held" if held else "refuted"
    picture = curves("Reading the same text again", "tokens trained on", "validation bits per byte", series)
    return Findings(claims, {"repetition.svg": picture})


SHAPE = dict(head_dim=32, window_pattern="L", weight_decay=0.0)
EXPERIMENT = Experiment(
    question="How often can the same text be read before it stops paying?",
    hypothesis="Up to 4 epochs a repeated token is worth more than half of a fresh one, as in Muennighoff et al., "
    "arXiv:2305.16264; at 16 epochs repetition no longer lowers the loss. Declared second, knowing that 16,384 tokens "
    "still paid at 16 epochs, with shrinking gains: the loss is lowest before 64 epochs, of both 16,384 unique tokens "
    "and 4,096, and of the fewer tokens at no more epochs.",
    refuted_by="A compute multiplier of 4 epochs of 0.5 or less, or a loss that is lowest at 16 epochs. Second: a mean "
    "loss that is lowest at 64 epochs with either text, or that of 4,096 tokens lowest at more epochs than of 16,384.",
    metric="validation bits per byte on text that no cell was trained on; compute of fresh text for the same loss "
    "over the compute spent",
    budget="18 trainings of 2 to 15 s on one core, then 20 of 1 s to 2 minutes; two seeds",
    cells=(
        *(dict(unique=UNIQUE, epochs=epochs) for epochs in EPOCHS),
        *(dict(unique=unique, epochs=FRESH) for unique in (32_768, 65_536, 131_072, 262_144)),
        dict(unique=2 * LESS, epochs=FRESH),
        *(dict(unique=LESS, epochs=epochs) for epochs in EPOCHS + LONGER),
        *(dict(unique=UNIQUE, epochs=epochs) for epochs in LONGER),
    ),
    seeds=(1, 2),
    run=run,
    findings=findings,
    size=dict(
        SHAPE,
        depth=2,
        aspect_ratio=32,
        max_seq_len=128,
        device_batch_size=8,
        total_batch_size=1024,
        eval_tokens=32768,
        scale=1.0,
    ),
    smoke=dict(
        SHAPE,
        depth=1,
        aspect_ratio=32,
        max_seq_len=32,
        device_batch_size=2,
        total_batch_size=64,
        eval_tokens=64,
        scale=0.01,
    ),
    smoke_cells=(
        dict(unique=16_384, epochs=1),
        dict(unique=16_384, epochs=4),
        dict(unique=32_768, epochs=FRESH),
    ),
)
