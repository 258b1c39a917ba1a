"""Questions that are answered by writing: greedily, or by several samples of each, with the tool where it is called.

`answered` asks and grades; who writes is an `Answer`: `by_engine` here, or a server (evaluate/server.py). Each sample's
seed follows from the task, the question's place in it and the sample's number: the same text comes whichever rank or
batch a question is in.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from nanochat.calculator import calculate
from nanochat.chat import Tool, answers, prompt_within, visible_text
from nanochat.engine import Engine, Sampling
from nanochat.evaluate.categorical import Numbered
from nanochat.tasks import Task
from nanochat.tokenizer import Tokenizer

GRADERS = 4  # answers that are graded at a time


@dataclass(frozen=True)
class Written:
    """What came: text without the tool's part, the tool's calls, whether the question was too long for the model."""

    text: str
    python: list[str]
    cropped: bool = False


Tick = Callable[[int], None]  # called with how many answers have been finished since it was called last
# From conversations, the longest answer in tokens, and each one's sampling.
Answer = Callable[[Sequence[list[dict]], int, Sequence[Sampling], Tick], list[Written]]


def by_engine(engine: Engine, tokenizer: Tokenizer, tool: Tool = calculate) -> Answer:
    """All answers together, in the engine's slots."""

    def answer(
        conversations: Sequence[list[dict]], limit: int, samplings: Sequence[Sampling], tick: Tick
    ) -> list[Written]:
        context = engine.config.sequence_len
        written = []
        try:
            found = answers(engine, tokenizer, conversations, limit, samplings, tool, tick)
        except BaseException:  # the next task begins with an empty engine
            for request in [*engine.running, *engine.waiting]:
                engine.cancel(request)
            engine.retire()
            raise
        for messages, events in zip(conversations, found):
            calls = [event.text for event in events if event.kind == "python"]
            whole = tokenizer.render_for_completion(messages)
            cropped = prompt_within(tokenizer, messages, limit, context) != whole
            written.append(Written(visible_text(events), calls, cropped))
        return written

    return answer


def seed(base: int, task: str, index: int, sample: int) -> int:
    """Of one sample of one question."""
    digest = hashlib.sha256(f"{base}\0{task}\0{index}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def answered(
    answer: Answer,
    task: Task,
    questions: Sequence[Numbered],
    limit: int,
    sampling: Sampling,
    samples: int = 1,
    tick: Tick = lambda done: None,
) -> list[dict[str, Any]]:
    """A row for each question: index, question, expected, the first sample's answer, tool calls and outcome; with
    several samples, "samples" has every one's outcome.
    """
    asked = [(index, question, sample) for index, question in questions for sample in range(samples)]
    own = [replace(sampling, seed=seed(sampling.seed, task.name, index, sample)) for index, _, sample in asked]
    of = [question for _, question, _ in asked]
    written = answer([question.messages for question in of], limit, own, tick)
    with ThreadPoolExecutor(GRADERS) as pool:  # a program's tests run in a process of their own
        graded = list(pool.map(task.grade, of, [one.text for one in written]))
    rows = []
    for at, (index, question) in enumerate(questions):
        outcomes, first = graded[at * samples : (at + 1) * samples], written[at * samples]
        row = dict(
            index=index,
            question=question.messages[-1]["content"],
            expected=question.expected,
            answer=first.text.strip(),
            python=first.python,
            outcome=outcomes[0],
            cropped=first.cropped,
        )
        rows.append({**row, "samples": outcomes} if samples > 1 else row)
    return rows


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that at least one of k samples is right, estimated without bias from n ≥ k of which so many were:
    1 − C(n − right, k) / C(n, k) (Chen et al., 2021, arXiv:2107.03374).
    """
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"pass_at_k: n={n}, right={right}, k={k}, wanted 1 ≤ k ≤ n and 0 ≤ right ≤ n")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
