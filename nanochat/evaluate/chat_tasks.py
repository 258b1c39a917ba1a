"""Asking a model a task's questions and grading its answers, with an interval around every rate."""

import math
from dataclasses import dataclass
from typing import Any

from nanochat.chat import answers, visible_text
from nanochat.engine import Engine, Sampling
from nanochat.tasks.task import OUTCOMES, Task
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class TaskResult:
    """Counts over n questions; `rate` is the share that came out as wanted, (low, high) its 95% interval."""

    task: str
    wanted: str
    n: int
    counts: dict[str, int]
    examples: list[dict[str, Any]]  # every question in order, with answer and outcome

    @property
    def rate(self) -> float:
        return self.counts[self.wanted] / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.counts[self.wanted], self.n)

    def numbers(self) -> dict[str, Any]:
        """For a JSON file, with the first three examples of each outcome."""
        low, high = self.interval
        first = {kind: [e for e in self.examples if e["outcome"] == kind][:3] for kind in OUTCOMES}
        return dict(
            examples=first,
            task=self.task,
            wanted=self.wanted,
            n=self.n,
            counts=self.counts,
            rate=self.rate,
            low=low,
            high=high,
        )


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a rate (E. B. Wilson, 1927): sensible also near 0 and 1."""
    if n == 0:
        return math.nan, math.nan
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    engine: Engine, tokenizer: Tokenizer, task: Task, n: int, max_tokens: int, sampling: Sampling
) -> TaskResult:
    """The first n questions of a task, answered together."""
    questions = task.questions(n)
    replies = answers(engine, tokenizer, [question.messages for question in questions], max_tokens, sampling)
    counts = dict.fromkeys(OUTCOMES, 0)
    examples = []
    for question, events in zip(questions, replies):
        answer = visible_text(events).strip()
        outcome = task.grade(question, answer)
        counts[outcome] += 1
        used = [event.text for event in events if event.kind == "python"]
        examples.append(
            dict(
                question=question.messages[-1]["content"],
                expected=question.expected,
                answer=answer,
                python=used,
                outcome=outcome,
            )
        )
    return TaskResult(task.name, task.wanted, len(questions), counts, examples)
