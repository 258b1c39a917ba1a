"""MMLU: multiple choice over 57 subjects, from elementary mathematics to law.

A question's id begins with its subject. Training takes auxiliary_train, which is made of other data sets (RACE, ARC and
more) and has no subjects. Source: Hendrycks et al., arXiv:2009.03300; cais/mmlu on the Hub.
"""

from nanochat.data import hub
from nanochat.data.microworld.conversations import choice_prompt
from nanochat.tasks.rows import Rendered, conversation, shuffled
from nanochat.tasks.task import Question, Task, ask, is_only

TEST = ("cais/mmlu", "all", "test")
LETTERS = ("A", "B", "C", "D")


def train() -> Rendered:
    """Conversations of auxiliary_train (99,842)."""
    return Rendered(
        hub.dataset("cais/mmlu", "all", "auxiliary_train"),
        lambda row: conversation(prompt(row), LETTERS[row["answer"]]),
    )


def prompt(row: dict) -> str:
    return choice_prompt(row["question"], row["choices"], LETTERS)


def questions() -> list[Question]:
    return shuffled(
        "mmlu",
        (
            Question(ask(prompt(row)), LETTERS[row["answer"]], letters=LETTERS, id=f"{row['subject']}/{i}")
            for i, row in enumerate(hub.dataset(*TEST))
        ),
    )


def tasks() -> list[Task]:
    return [Task("mmlu", "multiple choice over 57 subjects", questions, is_right=is_only, chance=0.25)]
