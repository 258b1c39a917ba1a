"""MMLU: multiple choice over 57 subjects, from elementary mathematics to law.

A question's id begins with its subject. Training takes auxiliary_train, which is made of other data sets (RACE, ARC and
more) and has no subjects. Source: Hendrycks et al., arXiv:2009.03300; cais/mmlu on the Hub.
"""

from nanochat.data import hub
from nanochat.data.microworld.conversations import choice_prompt
from nanochat.tasks.rows import Rendered, conversation, of_rows, shuffled, text, texts
from nanochat.tasks.task import Question, Task, ask, is_only

TEST = ("cais/mmlu", "all", "test")
LETTERS = ("A", "B", "C", "D")


def train() -> Rendered:
    """Conversations of auxiliary_train (99,842)."""
    return Rendered(
        hub.dataset("cais/mmlu", "all", "auxiliary_train"),
        lambda row: conversation(prompt(row), answer(row)),
    )


def prompt(row: dict) -> str:
    if len(texts(row["choices"], "choices")) != len(LETTERS):
        raise ValueError(f"it has {len(row['choices'])} choices, wanted {len(LETTERS)}")
    return choice_prompt(text(row, "question"), row["choices"], LETTERS)


def answer(row: dict) -> str:
    if row["answer"] not in range(len(LETTERS)):
        raise ValueError(f"its answer is {row['answer']!r}, wanted 0 to {len(LETTERS) - 1}")
    return LETTERS[row["answer"]]


def questions() -> list[Question]:
    make = lambda row, i: Question(ask(prompt(row)), answer(row), letters=LETTERS, id=f"{text(row, 'subject')}/{i}")
    return shuffled("mmlu", of_rows(TEST, make))


def tasks() -> list[Task]:
    return [Task("mmlu", "multiple choice over 57 subjects", questions, is_right=is_only, chance=0.25)]
