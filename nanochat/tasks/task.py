"""What a task is: questions in a fixed order, and a judge that sorts answers into right, wrong and refused."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from nanochat.data.microworld.conversations import REFUSED

OUTCOMES = ("right", "wrong", "refused")


@dataclass(frozen=True)
class Question:
    """One question, and what answers it."""

    messages: list[dict]  # ends with the user's question
    expected: str  # the answer, "" for none; of a multiple-choice question its letter
    others: tuple[str, ...] = ()  # other questions' answers, which must not stand beside the expected one
    letters: tuple[str, ...] = ()  # of a multiple-choice question, answered by their logits; () for one that is sampled
    id: str = ""  # what names it in a file of failures; "" for its place in the task


def says(question: Question, answer: str) -> bool:
    """The expected answer stands in the text, and none of the others does."""
    return mentions(answer, question.expected) and not any(mentions(answer, other) for other in question.others)


def ends_with_number(question: Question, answer: str) -> bool:
    """The last number of the first sentence is the expected one: in "46 + 12 = 58" the 46 is no answer.

    The first, because a base model does not stop: among the sums that it goes on to make up, any number may turn up.
    """
    first = re.split(r"\.\s", answer.strip(" ."))[0]
    numbers = re.findall(r"-?\d+(?:[.,]\d+)*", first)
    return bool(numbers) and numbers[-1].replace(",", "") == question.expected


def is_only(question: Question, answer: str) -> bool:
    """The expected answer and nothing else: a letter is also a word, and stands in "A or B"."""
    return answer.strip().rstrip(".") == question.expected


def final_number(text: str) -> str | None:
    """The number after the first "####", without commas, or None: how GSM8K marks an answer.

    As OpenAI's grade-school-math and nanochat read it: a full stop after the number belongs to it, and makes it wrong.
    """
    found = re.search(r"#### (-?[\d.,]+)", text)
    return found.group(1).replace(",", "") if found else None


def ends_with_mark(question: Question, answer: str) -> bool:
    """The number after "####" is the expected one."""
    return final_number(answer) == question.expected


@dataclass(frozen=True)
class Task:
    """A named list of questions. `wanted` is the outcome that is good: "right", or "refused" where nobody can know.

    `all_questions` gives every question in a fixed shuffled order; `is_right` compares an answer with the expected one.
    """

    name: str
    description: str
    all_questions: Callable[[], list[Question]]
    wanted: str = "right"
    is_right: Callable[[Question, str], bool] = says
    chance: float = 0.0  # the rate of blind guessing, by which a rate is centred
    limit: int = 64  # longest answer, in tokens

    def questions(self, n: int) -> list[Question]:
        """The first n, or all there are."""
        return self.all_questions()[:n]

    def grade(self, question: Question, answer: str) -> str:
        """Refused when it says so; wrong where nothing is expected; else what `is_right` finds."""
        if REFUSED in answer.lower():
            return "refused"
        return "right" if question.expected and self.is_right(question, answer) else "wrong"


def mentions(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text as whole words, upper and lower case alike; c-a-t does not stand in c-a-t-s."""
    return re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text, re.IGNORECASE) is not None


def ask(text: str) -> list[dict]:
    return [dict(role="user", content=text)]
