"""What a score of 500 questions is worth: seeds against the choice of questions against the wording of a prompt."""

import json
import statistics
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from experiments import training
from nanochat.data.microworld import Documents, World
from nanochat.data.microworld.dice import Dice
from nanochat.evaluate.intervals import McNemar, Z, mean, wilson
from nanochat.gpt import GPT
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.estimate import Interval, formatted
from nanochat.lab.plot import curves
from nanochat.lab.table import Value, Values, matches
from nanochat.tokenizer import Tokenizer

WORDINGS, QUESTIONS, DRAWS = 4, 500, 100
CHARACTERS = 2.3  # of a token of this tokenizer, about
GAPS = (0, 2, 4, 8, 12, 100)  # percentage points between two models, in bins
PEOPLE = 120  # of the world, so that a short training tells of each often


def biographies(seed: int, characters: float) -> list[str]:
    """Texts about the first PEOPLE of the world, and about nothing else."""
    source, dice, made = Documents(draw=seed), Dice(f"evaluation noise {seed}"), []
    source.world.people = source.world.people[:PEOPLE]
    while characters > 0:
        made.append(source.biography(dice))
        characters -= len(made[-1])
    return made


def asked(tokenizer: Tokenizer, wording: int) -> list[tuple[list[int], list[int]]]:
    """Every fact about them as (prompt's ids, answer's ids), in the so-many-th wording that ends with the value."""
    world, made = World(), []
    for person in world.people[:PEOPLE]:
        for fact in world.facts[person]:
            usable = [text for text in fact.attribute.statements if text.endswith("{v}.")]
            text = usable[wording].format(n=fact.person, v="|")
            prompt = text[0].upper() + text[1 : text.index("|")].rstrip()
            made.append(([tokenizer.bos, *tokenizer.encode(prompt)], list(tokenizer.encode(f" {fact.value}."))))
    return made


@torch.no_grad()
def recalled(model: GPT, items: list[tuple[list[int], list[int]]], at_once: int = 128) -> str:
    """ "1" for each item whose every token of the answer is the likeliest, else "0"; "=" before them."""
    outcomes = []
    for begin in range(0, len(items), at_once):
        some = items[begin : begin + at_once]
        longest = max(len(prompt) + len(answer) for prompt, answer in some)
        ids = torch.zeros(len(some), longest, dtype=torch.int64)  # (B, T); what follows an answer changes nothing
        for row, (prompt, answer) in zip(ids, some):
            row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        likeliest = model.logits(model.hidden(ids.to(model.lm_head.weight.device))).argmax(-1).cpu()  # (B, T)
        for row, (prompt, answer) in zip(likeliest, some):
            said = row[len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist()
            outcomes.append("1" if said == answer else "0")
    return "=" + "".join(outcomes)


def run(cell: Values, seed: int, size: Mapping[str, Any]) -> dict[str, Value]:
    flags = {key: value for key, value in size.items() if key != "share"}
    steps = max(2, int(cell["steps"] * size["share"]))
    with TemporaryDirectory() as place:
        texts = {
            "train": biographies(seed, 1.1 * CHARACTERS * steps * flags["total_batch_size"]),
            "val": biographies(0, 2e4),
        }
        for split, some in texts.items():
            Path(place, f"{split}.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in some), "utf-8")
        with training.base("evaluation_noise", seed, text=place, num_iterations=steps, **flags) as (made, summary):
            hardware, tokenizer = training.hardware(), made.tokenizer()
            model = made.checkpoint("base").model(hardware.device, hardware.dtype).eval()
            items = [asked(tokenizer, wording) for wording in range(WORDINGS)]
            found = {
                f"wording_{w}": recalled(model, some[: int(len(some) * size["share"])]) for w, some in enumerate(items)
            }
    return dict(val_bpb=summary["val_bpb"], **found)


def outcomes(rows: Rows, steps: int) -> np.ndarray:
    """(seeds, wordings, facts) of 0 and 1."""
    cells = [row for row in rows if matches(row, dict(steps=steps))]
    return np.array([[[int(c) for c in str(row[f"wording_{w}"])[1:]] for w in range(WORDINGS)] for row in cells])


def spreads(found: np.ndarray) -> dict[str, Interval]:
    """Standard deviations of a score in one wording, by what changes alone: the seed or the wording, all facts asked
    each time; or 500 questions, drawn from a world without end. Means with Student's t, no lower than 0: of the seeds'
    over the wordings, of the others over the seeds.
    """
    p = found.mean(-1)  # (seeds, wordings)
    each = dict(
        seeds=np.std(p, axis=0, ddof=1), wordings=np.std(p, axis=1, ddof=1),
        questions=np.sqrt(p * (1 - p) / QUESTIONS).mean(1),
    )  # fmt: skip
    means = {name: mean(values.tolist()) for name, values in each.items()}
    return {name: (value, max(0.0, low), high) for name, (value, low, high) in means.items()}


def seen_apart(one: np.ndarray, other: np.ndarray) -> float:
    """The share of samples of 500 questions on which McNemar's exact test tells two models apart (p < 0.05)."""
    draw, few, hits = np.random.default_rng(0), min(QUESTIONS, len(one)), 0
    for _ in range(DRAWS):
        chosen = draw.choice(len(one), few, replace=False)
        a, b = one[chosen], other[chosen]
        hits += McNemar(few, int((a > b).sum()), int((b > a).sum())).p < 0.05
    return hits / DRAWS


def findings(rows: Rows) -> Findings:
    lengths = sorted({int(row["steps"]) for row in rows})
    by_length = {steps: outcomes(rows, steps) for steps in lengths}
    middle = min(lengths, key=lambda steps: abs(float(by_length[steps].mean()) - 0.5))
    found, spread = by_length[middle], spreads(by_length[middle])
    p, whole = float(found.mean()), found.shape[-1]
    apart = lambda one, other: float((one != other).mean())
    disagree = statistics.fmean(apart(found[0, 0], found[s, 0]) for s in range(1, len(found)))
    by_model = mean(found.mean((1, 2)).tolist())
    unpaired = lambda p: 100 * Z * (2 * p * (1 - p) / QUESTIONS) ** 0.5
    same = lambda share: 100 * Z * (share / QUESTIONS) ** 0.5
    apart_bounds = wilson(disagree * whole, whole)
    claims = {f"recall at {steps}": f"{float(one.mean()):.1%}" for steps, one in by_length.items()}
    claims |= {
        name: formatted((100 * value, 100 * low, 100 * high), ".1f") for name, (value, low, high) in spread.items()
    }
    claims |= {
        "steps": str(middle),
        "facts": f"{whole:,}",
        "disagree": formatted((disagree, *apart_bounds), ".1%"),
        "shown apart": formatted((unpaired(p), *sorted(unpaired(min(0.5, max(0.0, q))) for q in by_model[1:])), ".1f"),
        "shown paired": formatted((same(disagree), *map(same, apart_bounds)), ".1f"),
        "best wording": f"{float(found.mean((0, 2)).max()):.1%}",
        "worst wording": f"{float(found.mean((0, 2)).min()):.1%}",
    }
    models = [model for one in by_length.values() for model in one]  # (wordings, facts) each
    pairs = [(a[w], b[w]) for a, b in combinations(models, 2) for w in range(WORDINGS)]
    powers = [(100 * abs(float(a.mean() - b.mean())), seen_apart(a, b)) for a, b in pairs]
    points = []
    for low, high in zip(GAPS, GAPS[1:]):
        if some := [power for gap, power in powers if low <= gap < high]:
            middle_gap = statistics.fmean(gap for gap, _ in powers if low <= gap < high)
            points.append((middle_gap, statistics.fmean(some), min(some), max(some)))
            claims[f"told apart, {low} to {high}"] = f"{statistics.fmean(some):.0%}"
    held = spread["wordings"][0] > spread["questions"][0] > spread["seeds"][0]
    claims["verdict"] = "held" if held else "refuted"
    claims["order"] = ", ".join(sorted(spread, key=lambda name: -spread[name][0]))
    title = "Pairs of models told apart by 500 questions"
    drawn = {"mean of pairs (lowest to highest)": points}
    picture = curves(title, "real difference, percentage points", "share of samples with p < 0.05", drawn, log_x=False)
    return Findings(claims, {"power.svg": picture})


EXPERIMENT = Experiment(
    question="Of a score's noise, how much is the seed's, the questions', the wording's? What difference can 500 "
    "questions show?",
    hypothesis="The wording of the prompt moves a score more than the choice of 500 questions does, and that more "
    "than the seed.",
    refuted_by="Any other order of the three standard deviations.",
    metric="recall of 720 facts about 120 people by completion, in four wordings that pretraining has; standard "
    "deviations in percentage points, where recall is nearest to a half",
    budget="6 trainings of 35 to 75 s on one core",
    cells=tuple(dict(steps=steps) for steps in (500, 350)),
    seeds=(1, 2, 3),
    run=run,
    findings=findings,
    size=dict(
        depth=2,
        aspect_ratio=48,
        head_dim=48,
        max_seq_len=64,
        window_pattern="L",
        device_batch_size=16,
        total_batch_size=1024,
        eval_tokens=16384,
        weight_decay=0.0,
        share=1.0,
    ),
    smoke=dict(training.SMOKE, share=0.01),
    smoke_seeds=2,
    smoke_cells=(dict(steps=400),),
)
