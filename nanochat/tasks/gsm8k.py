"""GSM8K: grade-school mathematics in words. The answer is the number after "####"; the calculator may be used.

In its solutions a mark <<48/2=24>> stands where somebody would use a calculator: it becomes a call of the python tool.
Source: Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168; openai/gsm8k on the Hub.
"""

import re

from nanochat.data import hub
from nanochat.tasks.rows import Rendered, conversation, key, keys, of_rows, shuffled, text
from nanochat.tasks.task import Question, Task, ask, ends_with_mark, final_number

TEST, TRAIN = (("openai/gsm8k", "main", split) for split in ("test", "train"))


def train() -> Rendered:
    """Conversations of the training split (7,473)."""
    return Rendered(hub.dataset(*TRAIN), lambda row: conversation(text(row, "question"), solution(text(row, "answer"))))


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
    return shuffled("gsm8k", of_rows(TEST, lambda row, i: _question(row, f"gsm8k/{i}")))


def train_questions() -> list[Question]:
    """Of the training split, to practise: without those that the test split asks too, in a fixed order."""
    asked, made = keys(hub.dataset(*TEST)), of_rows(TRAIN, lambda row, i: _question(row, f"gsm8k/train/{i}"))
    return shuffled("gsm8k train", [one for one in made if key(one.messages[0]["content"]) not in asked])


def _question(row: dict, id: str) -> Question:
    return Question(ask(text(row, "question")), final_number(text(row, "answer")) or "", id=id)


def tasks() -> list[Task]:
    return [Task("gsm8k", "mathematics in words, calculator allowed", questions, is_right=ends_with_mark, limit=512)]
