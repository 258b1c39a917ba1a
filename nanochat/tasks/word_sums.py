"""Word problems of the microworld: sums of 3- and 4-digit numbers in a story, by the tool. RL practises others."""

import re

from nanochat.data.microworld.dice import Dice
from nanochat.data.microworld.word_problems import people, word_problem
from nanochat.data.microworld.world import World
from nanochat.tasks.task import Question, Task, ask, ends_with_number

PRACTISED, ASKED = 8192, 600


def questions(world: World, held_out: bool) -> list[Question]:
    """Those to practise, or those that are asked; people, frames and sums of the two are different ones."""
    dice = Dice(f"task word_sums {'held out' if held_out else 'train'}")
    names, found = people(world, held_out), []
    for _ in range(ASKED if held_out else PRACTISED):
        text, a, b = word_problem(dice, names, held_out)
        found.append(Question(ask(text), str(a + b)))
    return found


def is_sum(answer: str) -> bool:
    """Whether an answer states a sum, right or wrong."""
    return re.search(r"\d \+ \d+ = \d", answer) is not None


def task(world: World) -> Task:
    description = "word problems with 3- and 4-digit sums, tool allowed"
    return Task("word_sums", description, lambda: questions(world, held_out=True), is_right=ends_with_number, limit=48)
