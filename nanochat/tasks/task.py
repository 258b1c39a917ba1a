"""What a task is: questions in a fixed order, and a judge that sorts answers into right, wrong and refused."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from nanochat.data.microworld.conversations import REFUSED

OUTCOMES = ("right", "wrong", "refused")


@dataclass(frozen=True)
class Question:
    """Messages that end with the user's question, the expected answer ("" for none), and other questions' answers."""

    messages: list[dict]
    expected: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A named list of questions. `wanted` is the outcome that is good: "right", or "refused" where nobody can know.

    `all_questions` gives every question in a fixed shuffled order.
    """

    name: str
    description: str
    all_questions: Callable[[], list[Question]]
    wanted: str = "right"

    def questions(self, n: int) -> list[Question]:
        """The first n, or all there are."""
        return self.all_questions()[:n]

    def grade(self, question: Question, answer: str) -> str:
        """Refused when it says so; right when the expected answer stands in it, and none of the others does."""
        if REFUSED in answer.lower():
            return "refused"
        if not question.expected or not mentions(answer, question.expected):
            return "wrong"
        return "wrong" if any(mentions(answer, other) for other in question.others) else "right"


def mentions(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text as whole words, upper and lower case alike."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def ask(text: str) -> list[dict]:
    return [dict(role="user", content=text)]
