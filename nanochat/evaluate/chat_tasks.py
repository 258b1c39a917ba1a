"""Asking a model a task's questions, over ranks, and what came of it, with an interval around every rate.

A task whose questions have letters is categorical (categorical.py), any other generative (generative.py). Start at
`evaluate`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.errors import UserError
from nanochat.evaluate import letters
from nanochat.evaluate.categorical import Numbered
from nanochat.evaluate.generative import pass_at_k
from nanochat.evaluate.intervals import clustered, wilson
from nanochat.hardware import Hardware
from nanochat.ranks import gathered
from nanochat.tasks import CHATCORE, MICROWORLD, TASKS, Question, Task
from nanochat.tasks.task import OUTCOMES

Row = dict[str, Any]  # a question's answer and outcome, as `categorical.answered` and `generative.answered` make it
SIGNS = dict(right="r", wrong="w", refused="x")  # of an outcome, in the string of all


@dataclass(frozen=True)
class TaskResult:
    """Every question's row, in order; `rate` is the share that came out as wanted, (low, high) its 95% interval."""

    task: Task
    kind: str  # "categorical" or "generative"
    asked: str  # fingerprint of the questions: only results of the same ones are comparable one by one
    rows: list[Row]

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def counts(self) -> dict[str, int]:
        return {outcome: sum(row["outcome"] == outcome for row in self.rows) for outcome in OUTCOMES}

    @property
    def rate(self) -> float:
        return self.counts[self.task.wanted] / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.counts[self.task.wanted], self.n)

    @property
    def failures(self) -> list[Row]:
        return [dict(task=self.task.name, **row) for row in self.rows if row["outcome"] != self.task.wanted]

    def numbers(self) -> dict[str, Any]:
        """For a JSON file, with the first three examples of each outcome.

        outcomes: a letter of SIGNS a question, in order. Where there are several samples: pass, by k; of multiple
        choice: letters, and permuted where the options were.
        """
        low, high = self.interval
        found: dict[str, Any] = dict(
            examples={kind: [row for row in self.rows if row["outcome"] == kind][:3] for kind in OUTCOMES},
            task=self.task.name,
            kind=self.kind,
            wanted=self.task.wanted,
            chance=self.task.chance,
            n=self.n,
            counts=self.counts,
            rate=self.rate,
            low=low,
            high=high,
            cropped=sum(row["cropped"] for row in self.rows),
            asked=self.asked,
            outcomes="".join(SIGNS[row["outcome"]] for row in self.rows),
        )
        if self.rows and "samples" in self.rows[0]:
            found["pass"] = self._passes()
        if self.rows and self.kind == "categorical":
            found["letters"] = letters.shares(self.rows)
        if self.rows and "shifts" in self.rows[0]:
            found["permuted"] = letters.over_shifts(self.rows)
        return found

    def _passes(self) -> dict[str, dict[str, float]]:
        """By k, {"rate", "low", "high"}: the interval is over the questions, whose samples are not independent."""
        n = len(self.rows[0]["samples"])
        right = [sum(outcome == self.task.wanted for outcome in row["samples"]) for row in self.rows]
        found = {}
        for k in sorted({1 << i for i in range(n.bit_length())} | {n}):
            rate, low, high = clustered([pass_at_k(n, count, k) for count in right], n // k)
            found[str(k)] = dict(rate=rate, low=low, high=high)
        return found


def fingerprint(questions: Sequence[Question]) -> str:
    """Of the questions and their answers, in order."""
    content = [[question.messages, question.expected, question.letters] for question in questions]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


Asker = Callable[[Task, list[Numbered]], list[Row]]


def evaluate(task: Task, n: int, ask: Asker, hardware: Hardware) -> TaskResult:
    """The first n questions of a task (0: all), divided over the ranks by their place. Collective; the same result on
    every rank.

    ask: gives a row for each of the questions of this rank. What fails on one rank fails on every one, as the UserError
    it was or as a RuntimeError: the ranks are then still together, and go on with the next task.
    """
    questions: list[Question] = []
    rows: list[Row] = []
    problem: Exception | None = None
    try:
        questions = task.all_questions()[: n or None]
        if not questions:
            raise UserError(f"the task {task.name} has no questions")
        rows = ask(task, list(enumerate(questions))[hardware.rank :: hardware.world])
    except Exception as error:  # whatever it is, the other ranks wait for this one's part
        if hardware.world == 1:
            raise
        problem = error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
    if hardware.world > 1:
        parts = gathered((rows, problem), hardware.world)
        for rank, (_, failed) in enumerate(parts):
            if failed:
                raise type(failed)(f"rank {rank}: {failed}")
        rows = [row for part, _ in parts for row in part]
    rows = sorted(rows, key=lambda row: row["index"])
    for row in rows:
        row["id"] = questions[row["index"]].id or f"{task.name}/{row['index']}"
    kind = "categorical" if questions[0].letters else "generative"
    return TaskResult(task, kind, fingerprint(questions), rows)


def chosen(asked: str, data: str) -> tuple[list[str], bool]:
    """(names of tasks, whether the user named them): a list, "all", or "" for those that fit what the model was trained
    on, by its data's name. Raises UserError for one that is not there.
    """
    if asked and asked != "all":
        for name in asked.split(","):
            if name not in TASKS:
                raise UserError(f"--tasks names {name!r}; the tasks are {', '.join(TASKS)}, or all, which stands alone")
        return asked.split(","), True
    fitting = MICROWORLD if data.startswith("microworld") else CHATCORE
    names = [name for name in TASKS if asked == "all" or name in fitting]
    if not names:
        raise UserError(f"no task is chosen for a model trained on {data}; --tasks names some of {', '.join(TASKS)}")
    return names, False
