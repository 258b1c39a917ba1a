"""GSM8K: grade-school mathematics in words. The answer is the number after "####"; the calculator may be used.

In its solutions a mark <<48/2=24>> stands where somebody would use a calculator: it becomes a call of the python tool.
Source: Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168; openai/gsm8k on the Hub.
"""

import re

from nanochat.data import hub
from nanochat.tasks.rows import Rendered, conversation, key, keys, shuffled
from nanochat.tasks.task import Question, Task, ask, ends_with_mark, final_number

TEST = ("openai/gsm8k", "main", "test")


def train() -> Rendered:
    """Conversations of the training split (7,473)."""
    return Rendered(
        hub.dataset("openai/gsm8k", "main", "train"), lambda row: conversation(row["question"], solution(row["answer"]))
    )


def solution(answer: str) -> list[dict]:
    """A solution as parts of a message: text, and for each mark the call and its output."""
    parts = []
    for part in re.split(r"(<<[^>]*>>)", answer):
        if part.startswith("<<"):
            expression, _, result = part[2:-2].rpartition("=")
            parts += [dict(type="python", text=expression), dict(type="python_output", text=result)]
        elif part:
            parts.append(dict(type="text", text=part))
    return parts


def questions() -> list[Question]:
    return shuffled("gsm8k", (_question(row, f"gsm8k/{i}") for i, row in enumerate(hub.dataset(*TEST))))


def train_questions() -> list[Question]:
    """Of the training split, to practise: without those that the test split asks too, in a fixed order."""
    asked, rows = keys(hub.dataset(*TEST)), hub.dataset("openai/gsm8k", "main", "train")
    kept = (_question(row, f"gsm8k/train/{i}") for i, row in enumerate(rows) if key(row["question"]) not in asked)
    return shuffled("gsm8k train", kept)


def _question(row: dict, id: str) -> Question:
    return Question(ask(row["question"]), final_number(row["answer"]) or "", id=id)


def tasks() -> list[Task]:
    return [Task("gsm8k", "mathematics in words, calculator allowed", questions, is_right=ends_with_mark, limit=512)]
