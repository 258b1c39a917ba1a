"""The world of this experiment, and other conversations about it: what is patched while a cell runs.

80 people, three tenths of them silent, of whom pretraining tells unequally often: of some 8 times as often as of
others.
`world` and `conversations` are for a whole chain of trainings and its questions.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

from nanochat.data import ahead
from nanochat.data.microworld import Conversations, Documents, World
from nanochat.data.microworld import world as microworld
from nanochat.data.microworld.conversations import FRAMES, Message, exchange, question
from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.documents import ITEMS
from nanochat.data.microworld.world import ATTRIBUTES
from nanochat.tasks import Question, Task
from nanochat.tasks.facts import fact_question, facts_task, unknown_names_task

PEOPLE, SILENT = 80, 24
OFTEN = (1, 2, 4, 8)  # how often pretraining tells of the four groups of people
USUAL, NO_REFUSALS, REMEDY = "usual", "no refusals taught", "one fact of each silent person taught"
TAUGHT = ATTRIBUTES[0].name  # of silent people, in the remedy


def group(i: int) -> int:
    """Of the i-th person: in each there are as many silent ones, and as many facts of each kind and attribute."""
    return i // 2 % len(OFTEN)


def biography(self: Documents, dice: Dice) -> str:
    """As the usual one, but for who is mentioned."""
    weights = [(OFTEN[group(i)], person) for i, person in enumerate(self.world.people)]
    return " ".join(self._about(dice, dice.weighted(weights)) for _ in range(2 if dice.chance(15) else 1))


@contextlib.contextmanager
def world() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(microworld, "PEOPLE", PEOPLE),
            mock.patch.object(microworld, "SILENT", SILENT),
            mock.patch.object(Documents, "biography", biography),
            mock.patch.object(ahead, "children", lambda world: 0),  # other processes would not have these patches
        ):
            stack.enter_context(patch)
        yield


def exposures(draw: int, documents: int) -> list[float]:
    """How often the first so many documents of a draw mention a person, by group."""
    mentions: Counter[str] = Counter()
    usual = Documents._about

    def counting(self: Documents, dice: Dice, person: str) -> str:
        mentions[person] += 1
        return usual(self, dice, person)

    source = Documents(draw=draw)
    with mock.patch.object(Documents, "_about", counting):
        for unit in range(-(-documents // ITEMS)):
            source.load("train", unit)
    people = source.world.people
    return [
        sum(mentions[person] for i, person in enumerate(people) if group(i) == g) * len(OFTEN) / len(people)
        for g in range(len(OFTEN))
    ]


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


def tasks() -> dict[str, Task]:
    """By kind. The silent facts are those that the remedy does not teach either."""
    here, dice = World(), Dice("experiment knowledge")
    silent = [fact for fact in dice.shuffled(here.of_kind("silent")) if fact.attribute.name != TAUGHT]
    asked: list[Question] = [fact_question(here, dice, fact, FRAMES) for fact in silent]
    return {
        "taught": facts_task(here, "facts_taught", "", "taught", FRAMES),
        "read": facts_task(here, "facts_pretrained", "", "pretrained", FRAMES),
        "silent": Task("facts_silent", "", lambda: asked),
        "unknown": unknown_names_task(here),
    }
