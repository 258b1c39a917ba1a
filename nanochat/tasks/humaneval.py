"""HumanEval: Python functions to be written from their signature and docstring, and tried on tests.

Only a sandbox runs what a model wrote (nanochat/humaneval.py). There is no training split.
Source: Chen et al., Evaluating Large Language Models Trained on Code, arXiv:2107.03374; openai/openai_humaneval.
"""

import re
from functools import cache
from pathlib import Path

from nanochat.data import hub
from nanochat.tasks.rows import shuffled
from nanochat.tasks.task import Question, Task, ask

TEST = ("openai/openai_humaneval", "openai_humaneval", "test")


@cache
def problems(mirror: Path | None) -> dict[str, dict[str, str]]:
    """Rows by task_id. mirror: where they are read from, so that another one is read anew."""
    return {row["task_id"]: row for row in hub.dataset(*TEST)}


def questions() -> list[Question]:
    return shuffled(
        "humaneval",
        (
            Question(ask(row["prompt"]), row["canonical_solution"], id=row["task_id"])
            for row in problems(hub.mirror()).values()
        ),
    )


def completion(problem: dict[str, str], answer: str) -> str:
    """What follows the problem's prompt in the program that an answer stands for.

    Of the first fenced block of code, or of the whole answer where there is none: all of it, or what comes after the
    prompt where the prompt is repeated. A whole function without the prompt is a second definition, and replaces the
    first, whose body is then its docstring. A bare body has lost its first line's indentation where an answer was
    stripped.
    """
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", answer, re.DOTALL)
    code = block.group(1) if block else answer
    if code.lstrip().startswith(problem["prompt"].strip()):
        return code.lstrip()[len(problem["prompt"].strip()) :]
    if re.search(rf"^def {problem['entry_point']}\b", code, re.MULTILINE):
        return "\n" + code
    return code if code[:1].isspace() else "    " + code


def passes(question: Question, answer: str) -> bool:
    """Whether the program passes the problem's tests. Raises UserError where no sandbox can be had."""
    from nanochat.humaneval import check  # here: what isolates is looked for when it is imported

    problem = problems(hub.mirror())[question.id]
    return check(problem, completion(problem, answer)) == ""


def tasks() -> list[Task]:
    return [Task("humaneval", "Python functions, tried on their tests", questions, is_right=passes, limit=512)]
