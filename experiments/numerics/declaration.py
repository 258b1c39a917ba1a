"""bfloat16 and fp8 against float32 over a training; logits with and without the softcap; how a loss spike begins."""

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from experiments import training
from experiments.ablations.paths import without
from nanochat.data import choose
from nanochat.data.loader import Rows as Shape
from nanochat.data.loader import document_encoder, one_pass
from nanochat.gpt import GPT
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.estimate import by_seed, paired, said
from nanochat.lab.plot import forest
from nanochat.lab.table import Value, Values
from nanochat.run import Run

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
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
    flags = {**size, **way, **rates}
    with without(trick), training.base("numerics", seed, spike_guard=False, **flags) as (made, summary):
        losses = training.losses(made)
        top = largest_logit(made, int(size["max_seq_len"]))
    jumps = [after - statistics.fmean(losses[max(0, i - 8) : i]) for i, after in enumerate(losses) if i >= 8]
    return dict(val_bpb=summary["val_bpb"], logit=top, jump=max(jumps or [0.0]), skipped=summary["skipped_steps"])


@torch.no_grad()
def largest_logit(made: Run, context: int) -> float:
    """Largest absolute logit before the softcap, on 8 rows of validation text, in float32."""
    model: GPT = made.checkpoint("base").model(torch.device("cpu"), torch.float32).eval()
    tokenizer = made.tokenizer()
    shape = Shape(8, context)
    batch = next(one_pass(choose.documents("embedded", 0), "val", document_encoder(tokenizer), shape, 8, tokenizer.bos))
    return float(model.lm_head(model.hidden(batch.inputs)).abs().max())


def findings(rows: Rows) -> Findings:
    base = by_seed(rows, dict(way="float32"), "val_bpb")
    ways = [way for way in WAYS if any(row["way"] == way for row in rows)]
    effects = {way: paired(by_seed(rows, dict(way=way), "val_bpb"), base) for way in ways if way != "float32"}
    of = lambda way, what: statistics.fmean(by_seed(rows, dict(way=way), what).values())
    claims = {way: said(effect) for way, effect in effects.items()}
    claims |= {f"{way}: logit": f"{of(way, 'logit'):.1f}" for way in ways}
    claims |= {f"{way}: jump": f"{of(way, 'jump'):.2f}" for way in ways}
    claims |= {f"{way}: loss": f"{of(way, 'val_bpb'):.4f}" for way in ways}
    small = all(abs(effects[way][0]) < 0.01 for way in ("bfloat16", "fp8, emulated") if way in effects)
    grown = "no softcap" not in ways or of("no softcap", "logit") > of("float32", "logit")
    claims["verdict"] = "held" if small and grown else "refuted"
    title = "bits per byte more than float32 (95% interval, paired by seed)"
    return Findings(claims, {"numerics.svg": forest(title, list(effects.items()))})


EXPERIMENT = Experiment(
    question="What do bfloat16 and fp8 cost over a training, and what keeps logits and losses from running away?",
    hypothesis="bfloat16 and emulated fp8 end within 0.01 bits per byte of float32; without the softcap the largest "
    "logit "
    "is higher.",
    refuted_by="A mean difference of 0.01 or more, or no higher logits without the softcap.",
    metric="validation bits per byte against float32, paired by seed; the largest logit before the softcap; the "
    "largest jump "
    "of the training loss above its last eight",
    budget="24 trainings of 5 to 15 s on one core",
    cells=tuple(dict(way=way) for way in WAYS),
    seeds=(1, 2, 3),
    run=run,
    findings=findings,
    size=dict(
        depth=3,
        aspect_ratio=22,
        head_dim=32,
        max_seq_len=128,
        window_pattern="L",
        device_batch_size=8,
        total_batch_size=1024,
        eval_tokens=32768,
        weight_decay=0.0,
        num_iterations=100,
    ),
    smoke=dict(training.SMOKE, num_iterations=2),
    smoke_cells=tuple(dict(way=way) for way in ("float32", "fp8, emulated", "8 times the rates, no QK norm")),
)
