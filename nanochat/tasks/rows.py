"""Rows of a data set as conversations, rendered when asked for; and which of them a test asks too.

Training never sees a question of a test split, whichever data set it came by: `unasked` leaves such rows out. (MMLU's
auxiliary_train is made of other people's multiple choice, ARC's too; a mirror's train split may be cut from its test.)
Other people's rows may be malformed: in training the next sound one takes the place of such a row, in a test it is an
error, or scores would not compare.
"""

import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np

from nanochat.data import hub
from nanochat.data.microworld.conversations import exchange
from nanochat.data.microworld.dice import Dice
from nanochat.errors import UserError
from nanochat.tasks.task import Question
from nanochat.tokenizer import check_conversation

T = TypeVar("T")
MALFORMED = (ValueError, LookupError, TypeError, AttributeError)  # what reading a row of other columns raises


@dataclass(frozen=True)
class Rendered(Sequence[dict]):
    """Conversations of rows: of a `datasets.Dataset`, or of numbers that a generator makes conversations from.

    name: of a data set that others made, whose rows are looked at as they come: looking at all of SmolTalk first would
    take half a minute at every start. For a malformed one the next that is sound is taken, which is said once. Raises
    UserError where none is.
    """

    rows: Any
    render: Callable[[Any], dict]
    name: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        if not self.name:
            return self.render(self.rows[index])
        for at in range(index, index + len(self.rows)):
            try:
                made = self.render(self.rows[at % len(self.rows)])
                check_conversation(made)
                return made
            except MALFORMED as problem:
                note_malformed(self.name, why(problem))
        raise UserError(f"none of the rows of {self.name} is a conversation; get the data set again")

    def sample(self, n: int) -> "Rendered":
        """n of a data set's rows, drawn by a fixed seed, or all of them where there are no more."""
        if n >= len(self.rows):
            return self
        return replace(self, rows=self.rows.select(np.random.default_rng(42).permutation(len(self.rows))[:n]))

    def unasked(self, asked: set[str]) -> "Rendered":
        """Without the rows of a data set whose question is among those asked."""
        if "question" not in self.rows.column_names:
            return self
        try:
            questions = self.rows["question"][:]
        except ValueError as problem:  # no UTF-8, say
            raise UserError(f"{self.name} is damaged ({problem}); get the data set again") from None
        kept = [i for i, text in enumerate(questions) if not isinstance(text, str) or key(text) not in asked]
        return self if len(kept) == len(self.rows) else replace(self, rows=self.rows.select(kept))


@cache
def note_malformed(name: str, reason: str) -> None:
    """Once for each of a data set's first reasons."""
    print(f"note: a row of {name} is malformed ({reason}): the next is taken for it", file=sys.stderr, flush=True)


def of_rows(split: hub.Split, make: Callable[[dict, int], T]) -> list[T]:
    """make(row, index) of all rows of a split. Raises UserError for the first that is malformed."""
    name, made = ", ".join(filter(None, split)), []
    for number, row in numbered(name, hub.dataset(*split)):
        try:
            made.append(make(row, number - 1))
        except MALFORMED as problem:
            raise UserError(f"{name}, row {number} is malformed ({why(problem)}); get the data set again") from None
    return made


def numbered(name: str, rows: Iterable[dict]) -> Iterator[tuple[int, dict]]:
    """The rows from 1 on. Raises UserError where one cannot be read."""
    number = 0
    try:
        for number, row in enumerate(rows, 1):  # noqa: B007 (read below)
            yield number, row
    except ValueError as problem:  # no UTF-8, say
        raise UserError(f"{name}: what follows row {number} is damaged ({problem}); get the data set again") from None


def why(problem: Exception) -> str:
    return f"it has no {problem}" if isinstance(problem, KeyError) else str(problem)


def text(row: dict, name: str) -> str:
    """A column of a row. Raises ValueError where that is no text."""
    if not isinstance(row[name], str):
        raise ValueError(f"its {name} is {reprlib.repr(row[name])}, wanted a text")
    return row[name]


def texts(options: Any, name: str) -> list[str]:
    """The texts of a multiple-choice question's options. Raises ValueError where they are none."""
    if not isinstance(options, list) or not options or not all(isinstance(one, str) for one in options):
        raise ValueError(f"its {name} are {reprlib.repr(options)}, wanted texts")
    return options


def key(question: str) -> str:
    """A question whatever its spaces, punctuation, and upper and lower case."""
    return " ".join(re.findall(r"\w+", question.casefold()))


def keys(rows: Any) -> set[str]:
    """Of a data set's questions; those that are malformed are not asked either."""
    found = rows["question"][:] if "question" in rows.column_names else []
    return {key(question) for question in found if isinstance(question, str)}


def conversation(question: str, answer: str | list[dict]) -> dict:
    return dict(messages=exchange(question, answer))


def shuffled(name: str, questions: Iterable[Question]) -> list[Question]:
    """A task's questions in its fixed order, so that the first n are a fair sample."""
    return Dice(f"task {name}").shuffled(list(questions))
