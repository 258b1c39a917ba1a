"""Sums told as a story about somebody, half of them with longer numbers than the plain sums have: what RL practises.

Some people, frames and sums are kept for evaluation; no conversation has them, and RL does not practise them.
"""

from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.knowledge import addition
from nanochat.data.microworld.world import PEOPLE, SILENT, World

DIGITS = (3, 4)
THINGS = "coins stamps shells beads cards nails apples candles buttons bricks".split()
# {n} name, {a} and {b} numbers, {t} things. A frame is a story and a question; one in four pairs is only evaluated.
STORIES = (
    "{n} has {a} {t} and gets {b} more.",
    "{n} finds {a} {t} and then {b} {t}.",
    "{n} buys {a} {t} today and {b} tomorrow.",
    "{n} counts {a} {t} and {b} other {t}.",
    "{n} puts {a} {t} beside {b} {t}.",
)
QUESTIONS = (
    "How many {t} does {n} have?",
    "How many {t} are there?",
    "What is the total?",
    "How many {t} is that together?",
)


def frames(held_out: bool) -> list[str]:
    return [
        f"{story} {asked}"
        for i, story in enumerate(STORIES)
        for j, asked in enumerate(QUESTIONS)
        if ((i + j) % 4 == 0) == held_out
    ]


def people(world: World, held_out: bool) -> list[str]:
    """One in four of those who occur in conversations is kept for evaluation."""
    return [name for i, name in enumerate(world.people[: PEOPLE - SILENT]) if (i % 4 == 0) == held_out]


def word_problem(dice: Dice, names: list[str], held_out: bool) -> tuple[str, int, int]:
    """(the question, both numbers)."""
    a, b = addition(dice, dice.pick(DIGITS), held_out)
    frame = dice.pick(frames(held_out))
    return frame.format(n=dice.pick(names), a=a, b=b, t=dice.pick(THINGS)), a, b
