"""nanochat's miniseries (runs/miniseries.sh): one recipe, all depths, each compute-optimal by the one dial.

For one GPU with the Hub's data; of several GPUs one is used. The smoke run is the same series at toy size.
"""

from collections.abc import Mapping
from typing import Any

from experiments import training
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.estimate import power_law
from nanochat.lab.plot import curves
from nanochat.lab.table import Value, Values
from nanochat.recipe import RATES


def run(cell: Values, seed: int, size: Mapping[str, Any]) -> dict[str, Value]:
    flags: dict[str, Any] = {**size, "depth": int(cell["depth"])}
    flags["device_batch_size"] = size["device_batch_size"] // (2 if int(cell["depth"]) >= 20 else 1)
    with training.base("miniseries", seed, **flags) as (_, made):
        return dict(val_bpb=made["val_bpb"], tokens=made["tokens"], flops=made["flops"])


def findings(rows: Rows) -> Findings:
    points = sorted((float(row["flops"]), float(row["val_bpb"]), int(row["depth"])) for row in rows)
    claims = {f"depth {depth}": f"{loss:.4f}" for _, loss, depth in points}
    fit = power_law([flops for flops, _, _ in points], [loss for _, loss, _ in points])
    claims["exponent"] = f"{fit.exponent:.3f}"
    falling = all(one[1] > other[1] for one, other in zip(points, points[1:]))
    claims["verdict"] = "held" if falling else "refuted"
    line = {"measured": [(flops, loss, loss, loss) for flops, loss, _ in points]}
    picture = curves("The miniseries", "training FLOPs", "validation bits per byte", line)
    return Findings(claims, {"series.svg": picture})


EXPERIMENT = Experiment(
    question="Does the one dial give a series of models without crossings: more depth, lower loss, every time?",
    hypothesis="Every depth ends below the one before it.",
    refuted_by="A depth that ends no lower than the one before it.",
    metric="validation bits per byte on the Hub's text",
    budget="8 trainings on one H100, some 8 days for the deepest ones (predicted); not run",
    cells=tuple(dict(depth=depth) for depth in (12, 14, 16, 18, 20, 22, 24, 26)),
    seeds=(42,),
    run=run,
    findings=findings,
    size=dict(RATES, vocab_size=32768, data="hub", compile="auto", device_batch_size=32, target_param_data_ratio=12.0),
    smoke=dict(
        vocab_size=512,
        aspect_ratio=16,
        head_dim=16,
        max_seq_len=32,
        window_pattern="L",
        device_batch_size=2,
        target_param_data_ratio=0.01,
        total_batch_size=64,
        eval_tokens=64,
        weight_decay=0.0,
    ),
    smoke_cells=tuple(dict(depth=depth) for depth in (1, 2)),
)
