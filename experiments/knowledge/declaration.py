"""What a chat model knows, makes up and denies: facts taught, only read, and of people in no conversation."""

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from experiments import training
from nanochat.data.microworld import Conversations, World
from nanochat.data.microworld.conversations import FRAMES, Message, exchange, question
from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.world import ATTRIBUTES
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.estimate import by_seed, paired, said
from nanochat.lab.plot import forest
from nanochat.lab.table import Value, Values
from nanochat.tasks import TASKS, Task
from nanochat.tasks.facts import fact_question

KINDS = ("facts_taught", "facts_pretrained", "unknown_names")
USUAL, NO_REFUSALS, REMEDY = "usual", "no refusals taught", "one fact of each silent person taught"
TAUGHT = ATTRIBUTES[0].name  # of silent people, in the remedy


@contextlib.contextmanager
def conversations(variant: str) -> Iterator[None]:
    """Within it mid-training and SFT read other conversations."""
    usual_fact = Conversations.fact

    def silent_too(self: Conversations, dice: Dice) -> list[Message]:
        if not dice.chance(20):
            return usual_fact(self, dice)
        fact = dice.pick([one for one in self.world.of_kind("silent") if one.attribute.name == TAUGHT])
        asked = question(dice.pick(FRAMES), fact.attribute, fact.person, dice.below(2))
        return exchange(asked, fact.attribute.answer.format(n=fact.person, v=fact.value))

    with contextlib.ExitStack() as stack:
        if variant == NO_REFUSALS:
            stack.enter_context(mock.patch.object(Conversations, "unknown", usual_fact))
        elif variant == REMEDY:
            stack.enter_context(mock.patch.object(Conversations, "fact", silent_too))
        yield


def silent_task() -> Task:
    """Facts of people in no usual conversation that the remedy does not teach either."""
    world, dice = World(), Dice("experiment knowledge")
    facts = [fact for fact in dice.shuffled(world.of_kind("silent")) if fact.attribute.name != TAUGHT]
    return Task("facts_silent", "", lambda: [fact_question(world, dice, fact, FRAMES) for fact in facts])


def run(cell: Values, seed: int, size: Mapping[str, Any]) -> dict[str, Value]:
    with (
        training.base("knowledge", seed, **training.base_flags(size)) as (made, _),
        conversations(str(cell["variant"])),
    ):
        training.chat_chain(made, seed, size)
        found = training.ask(
            made, "sft", [*(TASKS[kind] for kind in KINDS), silent_task()], size["most"], size["limit"]
        )
    return {
        f"{name}_{outcome}": round(count / result.n, 4)
        for name, result in found.items()
        for outcome, count in result.counts.items()
    }


def findings(rows: Rows) -> Findings:
    claims: dict[str, str] = {}
    measured = [name for name in rows[0] if str(name).endswith(("_right", "_wrong", "_refused"))]
    variants = list(dict.fromkeys(str(row["variant"]) for row in rows))
    for variant in variants:
        for name in measured:
            values = by_seed(rows, dict(variant=variant), name).values()
            claims[f"{variant}: {name}"] = f"{statistics.fmean(values):.1%}"
    effects = []
    for variant in variants[1:]:
        for name in ("facts_silent_right", "unknown_names_refused", "facts_pretrained_right"):
            effect = paired(by_seed(rows, dict(variant=variant), name), by_seed(rows, dict(variant=USUAL), name))
            claims[f"{variant}: effect on {name}"] = said(effect, "+.1%")
            effects.append((f"{variant}: {name}", effect))
    mean = lambda variant, name: statistics.fmean(by_seed(rows, dict(variant=variant), name).values())
    denied = mean(USUAL, "facts_silent_refused") > 0.5
    cured = REMEDY in variants and mean(REMEDY, "facts_silent_right") > 2 * mean(USUAL, "facts_silent_right")
    claims["verdict"] = "held" if denied and cured else "refuted"
    title = "Change of a rate against the usual conversations"
    return Findings(claims, {"effects.svg": forest(title, effects or [(USUAL, (0.0, 0.0, 0.0))])})


EXPERIMENT = Experiment(
    question="Why does a chat model deny people whom it has read about, and does one asked fact of each cure that?",
    hypothesis="People in no conversation are refused more often than not, since SFT teaches who is asked about, "
    "not what is "
    "known; one taught fact of each at least doubles the share of their other facts that is answered.",
    refuted_by="Half of the silent facts or fewer refused, or less than twice as many answered with the remedy.",
    metric="answers right, wrong and refused, of 200 questions a kind, greedily",
    budget="9 chains of base, mid and SFT of about 5 minutes on one core",
    cells=tuple(dict(variant=variant) for variant in (USUAL, REMEDY, NO_REFUSALS)),
    seeds=(1, 2, 3),
    run=run,
    findings=findings,
    size=dict(training.CHAIN, num_iterations=400, most=200),
    smoke=dict(training.CHAIN_SMOKE, num_iterations=2, most=2),
    smoke_cells=tuple(dict(variant=variant) for variant in (USUAL, REMEDY)),
)
