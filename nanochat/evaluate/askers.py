"""Who answers a task's questions: a run's model, by letters' logits or by writing, or a model behind a server."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from nanochat.calculator import calculate
from nanochat.chat import Tool
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.evaluate import categorical, generative
from nanochat.evaluate.categorical import Numbered
from nanochat.evaluate.chat_tasks import Asker, Row
from nanochat.evaluate.server import Server
from nanochat.gpt import GPT
from nanochat.progress import Count
from nanochat.tasks import Task
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class How:
    """limit: the longest answer in tokens, 0 for what each task allows. tool: of a run's model; a server has its own.
    shown: whether progress is.
    """

    sampling: Sampling
    tool: Tool = calculate
    samples: int = 1
    limit: int = 0
    permute: bool = False
    shown: bool = False


def of_model(model: GPT, tokenizer: Tokenizer, slots: int, how: How) -> tuple[Asker, Callable[[], Engine]]:
    """(who asks it, what makes its engine): the engine's cache is for so many answers written at a time, and is made
    when one is. The model's weights are cast to the compute dtype, as the engine has them.
    """
    model = model.eval().to(model.dtype)
    engine = functools.cache(lambda: Engine(model, slots))

    def ask(task: Task, questions: list[Numbered]) -> list[Row]:
        if not _have_letters(questions):
            return _written(task, questions, generative.by_engine(engine(), tokenizer, how.tool), how)
        prompts = sum(len(question.letters) if how.permute else 1 for _, question in questions)
        with Count(task.name, prompts, how.shown) as count:
            return categorical.answered(model, tokenizer, task, questions, how.permute, count.tick)

    return ask, engine


def of_server(server: Server, how: How) -> Asker:
    """Raises UserError, when asked, for a task of multiple choice."""

    def ask(task: Task, questions: list[Numbered]) -> list[Row]:
        if _have_letters(questions):
            raise UserError("it is answered by the letters' logits, which a server does not give")
        return _written(task, questions, server.answer, how)

    return ask


def _have_letters(questions: list[Numbered]) -> bool:
    return bool(questions) and bool(questions[0][1].letters)


def _written(task: Task, questions: list[Numbered], answer: generative.Answer, how: How) -> list[Row]:
    limit = how.limit or task.limit
    with Count(task.name, len(questions) * how.samples, how.shown) as count:
        return generative.answered(answer, task, questions, limit, how.sampling, how.samples, count.tick)
