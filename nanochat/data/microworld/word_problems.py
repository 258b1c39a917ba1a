"""Sums told as a story about somebody, half of them with longer numbers than the plain sums have: what RL practises.

Some people, frames and sums are kept for evaluation; no conversation has them, and RL does not practise them.
"""

from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.knowledge import addition
from nanochat.data.microworld.world import PEOPLE, SILENT, World

DIGITS = (3, 4)
THINGS = "coins stamps shells beads cards nails apples candles buttons bricks".split()
# {n} name, {a} and {b} numbers, {t} things. The first list is trained, the second only evaluated.
FRAMES = (
    "{n} has {a} {t} and gets {b} more. How many {t} does {n} have?",
    "{n} finds {a} {t} and then {b} {t}. How many {t} are there?",
    "There are {a} {t} in a box and {b} in a bag. How many {t} does {n} see?",
    "{n} buys {a} {t} today and {b} tomorrow. How many {t} are that?",
    "How many {t} does {n} have after {a} {t} and {b} {t}?",
    "{n} counts {a} {t} and {b} other {t}. What is the total?",
)
EVAL_FRAMES = (
    "{n} had {a} {t}. A friend brings {b} {t}. How many {t} are there now?",
    "First {n} sells {a} {t}, then {b}. How many {t} does {n} sell?",
    "{n} puts {a} {t} beside {b} {t}. How many {t} is that together?",
)


def people(world: World, held_out: bool) -> list[str]:
    """One in four of those who occur in conversations is kept for evaluation."""
    return [name for i, name in enumerate(world.people[: PEOPLE - SILENT]) if (i % 4 == 0) == held_out]


def word_problem(dice: Dice, names: list[str], held_out: bool) -> tuple[str, int, int]:
    """(the question, both numbers)."""
    a, b = addition(dice, dice.pick(DIGITS), held_out)
    frame = dice.pick(EVAL_FRAMES if held_out else FRAMES)
    return frame.format(n=dice.pick(names), a=a, b=b, t=dice.pick(THINGS)), a, b
