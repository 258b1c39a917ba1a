"""Rows of a data set as conversations, rendered when asked for; and which of them a test asks too.

Training never sees a question of a test split, whichever data set it came by: `unasked` leaves such rows out. (MMLU's
auxiliary_train is made of other people's multiple choice, ARC's too; a mirror's train split may be cut from its test.)
Other people's rows may be malformed: of training they are left out, of a test they are an error, or scores would not
compare.
"""

import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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

    def sound(self, name: str) -> tuple["Rendered", str]:
        """(without the rows of a data set that are no conversation, a sentence about these or "")."""
        kept, first = [], ""
        for number, row in numbered(name, self.rows):
            try:
                check_conversation(self.render(row))
                kept.append(number - 1)
            except MALFORMED as problem:
                first = first or f"row {number}: {why(problem)}"
        if not first:
            return self, ""
        left_out = len(self.rows) - len(kept)
        said = f"{name}: {left_out:,} of {len(self.rows):,} rows are malformed ({first}), and are left out"
        return Rendered(self.rows.select(kept), self.render), said

    def unasked(self, asked: set[str]) -> "Rendered":
        """Without the rows of a data set whose question is among those asked."""
        if "question" not in self.rows.column_names:
            return self
        kept = [i for i, question in enumerate(self.rows["question"][:]) if key(question) not in asked]
        return self if len(kept) == len(self.rows) else Rendered(self.rows.select(kept), self.render)


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
