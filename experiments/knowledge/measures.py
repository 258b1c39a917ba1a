"""What a model of a chain is asked: facts to complete in the words of pretraining, and questions in the chat's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments import training
from experiments.evaluation_noise.declaration import asked, recalled
from experiments.knowledge import variants
from nanochat.chat import answers, visible_text
from nanochat.data.microworld import World
from nanochat.engine import Engine, Sampling
from nanochat.evaluate import generative
from nanochat.lab.table import Value
from nanochat.run import Run
from nanochat.tasks import Task
from nanochat.tasks.task import OUTCOMES

KINDS = ("taught", "read", "silent", "unknown")
GROUPS = range(len(variants.OFTEN))
WARM = (0.7, 1.0)  # temperatures besides greedy
SIGNS = dict(right="r", wrong="w", refused="x")


@dataclass(frozen=True)
class Said:
    """An answer: its outcome, and the probability that the model gave to the text of it."""

    kind: str
    outcome: str
    confidence: float
    group: int  # of the person; of a name of nobody −1


def completed(made: Run, stage: str, wordings: int) -> dict[str, Value]:
    """Share of facts whose every token is the likeliest, in so many wordings of pretraining, by kind and by group."""
    there = training.hardware()
    model = made.checkpoint(stage).model(there.device, there.dtype).eval()
    facts = [(i, fact) for i, its in enumerate(World().facts.values()) for fact in its]
    right = [0.0] * len(facts)
    for wording in range(wordings):
        for at, one in enumerate(recalled(model, asked(made.tokenizer(), wording))[1:]):
            right[at] += int(one) / wordings
    share = lambda chosen: round(sum(right[at] for at in chosen) / max(1, len(chosen)), 4)
    found: dict[str, Value] = {
        f"{stage}_completed_{g}": share([at for at, (i, _) in enumerate(facts) if variants.group(i) == g])
        for g in GROUPS
    }
    for kind, its in (("taught", "taught"), ("read", "pretrained"), ("silent", "silent")):
        found[f"{stage}_completed_{kind}"] = share([at for at, (_, fact) in enumerate(facts) if fact.kind == its])
    return found


def chat(engine: Engine, made: Run, kind: str, task: Task, size: Mapping[str, Any], temperature: float) -> list[Said]:
    """The answers to the first size["most"] questions of a task."""
    questions = task.questions(size["most"])
    sampling = [
        Sampling(temperature=temperature, seed=generative.seed(0, task.name, i, 0), logprobs=0)
        for i in range(len(questions))
    ]
    events = answers(engine, made.tokenizer(), [one.messages for one in questions], size["limit"], sampling)
    people, said = World().people, []
    for one, its in zip(questions, events):
        nats = sum(logprobs.chosen for event in its for _, logprobs in event.tokens)
        about = [i for i, person in enumerate(people) if person in one.messages[-1]["content"]]
        outcome = task.grade(one, visible_text(its))
        said.append(Said(kind, outcome, math.exp(nats), variants.group(about[0]) if about else -1))
    return said


def asked_all(made: Run, stage: str, size: Mapping[str, Any]) -> dict[str, Value]:
    """Rates of outcomes by kind; and of the SFT model by group, by temperature and by confidence."""
    there = training.hardware()
    model = made.checkpoint(stage).model(there.device, there.dtype).eval()
    engine, tasks, found = Engine(model, 64), variants.tasks(), {}  # type: Engine, dict[str, Task], dict[str, Value]
    greedy = {kind: chat(engine, made, kind, tasks[kind], size, 0.0) for kind in KINDS}
    found |= {name: rate for kind in KINDS for name, rate in rates(f"{stage}_{kind}", greedy[kind]).items()}
    if stage != "sft":
        return found
    for g in GROUPS:
        found[f"sft_read_right_{g}"] = rates("", [one for one in greedy["read"] if one.group == g])["_right"]
    for temperature in WARM:
        for kind in ("read", "unknown"):
            found |= rates(f"t{temperature}_{kind}", chat(engine, made, kind, tasks[kind], size, temperature))
    pool = sorted((one for kind in KINDS[1:] for one in greedy[kind]), key=lambda one: -one.confidence)
    found["ranked"] = "=" + "".join(one.kind[0] + SIGNS[one.outcome] for one in pool)
    found["confidence"] = "=" + " ".join(f"{one.confidence:.3f}" for one in pool)
    return found


def rates(name: str, said: list[Said]) -> dict[str, Value]:
    """Share of each outcome; 0 where nothing was asked."""
    share = lambda outcome: round(sum(one.outcome == outcome for one in said) / max(1, len(said)), 4)
    return {f"{name}_{outcome}": share(outcome) for outcome in OUTCOMES}
