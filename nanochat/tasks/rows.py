"""Rows of a data set as conversations, rendered when asked for; and which of them a test asks too.

Training never sees a question of a test split, whichever data set it came by: `unasked` leaves such rows out. (MMLU's
auxiliary_train is made of other people's multiple choice, ARC's too; a mirror's train split may be cut from its test.)
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat.data.microworld.conversations import exchange
from nanochat.data.microworld.dice import Dice
from nanochat.tasks.task import Question


@dataclass(frozen=True)
class Rendered(Sequence[dict]):
    """Conversations of rows: of a `datasets.Dataset`, or of numbers that a generator makes conversations from."""

    rows: Any
    render: Callable[[Any], dict]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        return self.render(self.rows[index])

    def sample(self, n: int) -> "Rendered":
        """n of a data set's rows, drawn by a fixed seed, or all of them where there are no more."""
        if n >= len(self.rows):
            return self
        return Rendered(self.rows.select(np.random.default_rng(42).permutation(len(self.rows))[:n]), self.render)

    def unasked(self, asked: set[str]) -> "Rendered":
        """Without the rows of a data set whose question is among those asked."""
        if "question" not in self.rows.column_names:
            return self
        kept = [i for i, question in enumerate(self.rows["question"][:]) if key(question) not in asked]
        return self if len(kept) == len(self.rows) else Rendered(self.rows.select(kept), self.render)


def key(question: str) -> str:
    """A question whatever its spaces, punctuation, and upper and lower case."""
    return " ".join(re.findall(r"\w+", question.casefold()))


def keys(rows: Any) -> set[str]:
    """Of a data set's questions."""
    return {key(question) for question in rows["question"][:]}


def conversation(question: str, answer: str | list[dict]) -> dict:
    return dict(messages=exchange(question, answer))


def shuffled(name: str, questions: Iterable[Question]) -> list[Question]:
    """A task's questions in its fixed order, so that the first n are a fair sample."""
    return Dice(f"task {name}").shuffled(list(questions))
