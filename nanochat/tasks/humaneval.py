"""HumanEval: Python functions to be written from their signature and docstring, and tried on tests.

Only a sandbox runs what a model wrote (nanochat/humaneval.py). There is no training split.
Source: Chen et al., Evaluating Large Language Models Trained on Code, arXiv:2107.03374; openai/openai_humaneval.
"""

from functools import cache
from pathlib import Path

from nanochat.data import hub
from nanochat.tasks.rows import of_rows, shuffled, text
from nanochat.tasks.task import Question, Task, ask

TEST = ("openai/openai_humaneval", "openai_humaneval", "test")
COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


@cache
def problems(mirror: Path | None) -> dict[str, dict[str, str]]:
    """Rows by task_id. mirror: where they are read from, so that another one is read anew."""
    rows = of_rows(TEST, lambda row, _: {name: text(row, name) for name in COLUMNS})
    return {row["task_id"]: row for row in rows}


def questions() -> list[Question]:
    return shuffled(
        "humaneval",
        (
            Question(ask(row["prompt"]), row["canonical_solution"], id=row["task_id"])
            for row in problems(hub.mirror()).values()
        ),
    )


def passes(question: Question, answer: str, unsandboxed: bool = False) -> bool:
    """Whether the program that an answer stands for passes the problem's tests.

    Raises UserError where it cannot be isolated, unless `unsandboxed`.
    """
    from nanochat.humaneval import check  # here: a training run that knows the task's name needs no sandbox

    return check(problems(hub.mirror())[question.id], answer, unsandboxed=unsandboxed) == ""


def tasks() -> list[Task]:
    return [Task("humaneval", "Python functions, tried on their tests", questions, is_right=passes, limit=512)]
