"""bfloat16 and fp8 against float32 over a training; logits with and without the softcap; how a loss spike begins."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from experiments import training
from experiments.ablations.paths import without
from nanochat.data import choose
from nanochat.data.loader import Rows as Shape
from nanochat.data.loader import document_encoder, one_pass
from nanochat.evaluate.intervals import mean
from nanochat.gpt import GPT
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.estimate import by_seed, formatted, multiplier, paired
from nanochat.lab.plot import forest
from nanochat.lab.table import Value, Values
from nanochat.run import Run

WHOLE, STEPS = "float32", 200
WAYS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "float32, 150 steps": dict(steps=150),  # with the next one: what a loss costs in compute
    "float32, 250 steps": dict(steps=250),
    "bfloat16": dict(dtype=torch.bfloat16),
    "fp8, emulated": dict(dtype=torch.bfloat16, fp8=True),
    "no softcap": dict(trick="softcap"),
    "no QK norm": dict(trick="QK norm"),
    "8 times the rates": dict(factor=8.0),
    "8 times the rates, no softcap": dict(factor=8.0, trick="softcap"),
    "8 times the rates, no QK norm": dict(factor=8.0, trick="QK norm"),
}


def run(cell: Values, seed: int, size: Mapping[str, Any]) -> dict[str, Value]:
    way = dict(WAYS[str(cell["way"])])
    trick, factor = way.pop("trick", ""), way.pop("factor", 1.0)
    rates = {name: rate * factor for name, rate in training.RATES.items()}
    steps = size["num_iterations"] * way.pop("steps", STEPS) // STEPS
    flags = {**size, **way, **rates, "num_iterations": steps}
    with without(trick), training.base("numerics", seed, spike_guard=False, **flags) as (made, summary):
        losses = training.losses(made)
        top = largest_logit(made, int(size["max_seq_len"]))
    return dict(val_bpb=summary["val_bpb"], flops=summary["flops"], logit=top, **spike(losses))


def spike(losses: Sequence[float]) -> dict[str, Value]:
    """The largest jump of a training loss above the mean of its last eight, in nats, the step at which it stood, and
    after how many steps four in a row were below that mean again: −1 where they never were.
    """
    before = [statistics.fmean(losses[i - 8 : i]) for i in range(8, len(losses))]
    if not before:
        return dict(jump=0.0, jump_step=-1, recovered=-1)
    at = max(range(8, len(losses)), key=lambda i: losses[i] - before[i - 8])
    level = before[at - 8]
    again = (i - at for i in range(at + 1, len(losses) - 3) if max(losses[i : i + 4]) < level)
    return dict(jump=losses[at] - level, jump_step=at + 1, recovered=next(again, -1))


@torch.no_grad()
def largest_logit(made: Run, context: int) -> float:
    """Largest absolute logit before the softcap, on 8 rows of validation text, in float32."""
    model: GPT = made.checkpoint("base").model(torch.device("cpu"), torch.float32).eval()
    tokenizer = made.tokenizer()
    shape = Shape(8, context)
    batch = next(one_pass(choose.documents("embedded", 0), "val", document_encoder(tokenizer), shape, 8, tokenizer.bos))
    return float(model.lm_head(model.hidden(batch.inputs)).abs().max())


def findings(rows: Rows) -> Findings:
    base = by_seed(rows, dict(way=WHOLE), "val_bpb")
    ways = [way for way in WAYS if any(row["way"] == way for row in rows)]
    losses = {way: by_seed(rows, dict(way=way), "val_bpb") for way in ways if not way.startswith(WHOLE)}
    effects = {way: paired(one, base) for way, one in losses.items()}
    of = lambda way, what: statistics.fmean(by_seed(rows, dict(way=way), what).values())
    claims = {way: formatted(effect) for way, effect in effects.items()}
    lengths = [row for row in rows if str(row["way"]).startswith(WHOLE)]
    if len({row["way"] for row in lengths}) > 1:
        curve = lambda seed: [(float(row["flops"]), float(row["val_bpb"])) for row in lengths if row["seed"] == seed]
        curves = {seed: curve(seed) for seed in base}
        factors = {way: multiplier(curves, of(WHOLE, "flops"), one) for way, one in losses.items()}
        claims |= {f"{way}: compute": formatted(factor, ".2f") for way, factor in factors.items()}
    claims |= {f"{way}: logit": f"{of(way, 'logit'):.1f}" for way in ways}
    claims |= {f"{way}: jump": f"{of(way, 'jump'):.2f}" for way in ways}
    claims |= {
        f"{way}: jump, 95%": formatted(mean([*by_seed(rows, dict(way=way), "jump").values()]), ".2f") for way in ways
    }
    for way in ways:
        back = [int(value) for value in by_seed(rows, dict(way=way), "recovered").values()]
        claims[f"{way}: jump at"] = ", ".join(str(int(at)) for at in by_seed(rows, dict(way=way), "jump_step").values())
        claims[f"{way}: back after"] = ", ".join(str(steps) if steps >= 0 else "never" for steps in back)
    claims |= {f"{way}: loss": f"{of(way, 'val_bpb'):.4f}" for way in ways}
    small = all(abs(effects[way][0]) < 0.01 for way in ("bfloat16", "fp8, emulated") if way in effects)
    grown = "no softcap" not in ways or of("no softcap", "logit") > of(WHOLE, "logit")
    claims["verdict"] = "held" if small and grown else "refuted"
    title = "bits per byte more than float32 (95% interval, paired by seed)"
    return Findings(claims, {"numerics.svg": forest(title, list(effects.items()))})


EXPERIMENT = Experiment(
    question="What do bfloat16 and fp8 cost over a training, and what keeps logits and losses from running away?",
    hypothesis="bfloat16 and emulated fp8 end within 0.01 bits per byte of float32; without the softcap the largest "
    "logit is higher.",
    refuted_by="A mean difference of 0.01 or more, or no higher logits without the softcap.",
    metric="validation bits per byte against float32, paired by seed, and as a compute multiplier from its own curve; "
    "the largest logit before the softcap; the largest jump of the training loss above its last eight",
    budget="30 trainings of 8 to 15 s on one core",
    cells=tuple(dict(way=way) for way in WAYS),
    seeds=(1, 2, 3),
    run=run,
    findings=findings,
    size=dict(
        depth=3,
        aspect_ratio=21,
        head_dim=32,
        max_seq_len=128,
        window_pattern="L",
        device_batch_size=8,
        total_batch_size=1024,
        eval_tokens=32768,
        weight_decay=0.0,
        num_iterations=STEPS,
    ),
    smoke=dict(training.SMOKE, num_iterations=2),
    smoke_cells=tuple(dict(way=way) for way in ("float32", "fp8, emulated", "8 times the rates, no QK norm")),
)
