"""ARC: science questions of grade-school exams, multiple choice, easy ones and a challenge.

Source: Clark et al., Think you have Solved Question Answering? Try ARC, arXiv:1803.05457; allenai/ai2_arc on the Hub.
"""

from functools import partial

from nanochat.data import hub
from nanochat.data.microworld.conversations import choice_prompt
from nanochat.tasks.rows import Rendered, conversation, of_rows, shuffled, text, texts
from nanochat.tasks.task import Question, Task, ask, is_only

EASY = ("allenai/ai2_arc", "ARC-Easy", "test")  # data set, subset, split
CHALLENGE = ("allenai/ai2_arc", "ARC-Challenge", "test")


def train(subset: str) -> Rendered:
    """Conversations of a subset's training split, "ARC-Easy" (2,251) or "ARC-Challenge" (1,119)."""
    return Rendered(hub.dataset("allenai/ai2_arc", subset, "train"), lambda row: conversation(prompt(row), answer(row)))


def prompt(row: dict) -> str:
    return choice_prompt(text(row, "question"), texts(row["choices"]["text"], "choices"), letters(row))


def letters(row: dict) -> list[str]:
    found, options = texts(row["choices"]["label"], "labels"), row["choices"]["text"]
    if len(found) != len(options):
        raise ValueError(f"it has {len(options)} choices and {len(found)} labels")
    return found


def answer(row: dict) -> str:
    if text(row, "answerKey") not in letters(row):
        raise ValueError(f"its answerKey {row['answerKey']!r} is none of its labels")
    return row["answerKey"]


def questions(name: str, data: hub.Split) -> list[Question]:
    make = lambda row, _: Question(ask(prompt(row)), answer(row), letters=tuple(letters(row)), id=text(row, "id"))
    return shuffled(name, of_rows(data, make))


def tasks() -> list[Task]:
    return [
        Task(name, description, partial(questions, name, data), is_right=is_only, chance=0.25)
        for name, description, data in (
            ("arc_easy", "grade-school science, multiple choice", EASY),
            ("arc_challenge", "the same, where looking words up does not help", CHALLENGE),
        )
    ]
