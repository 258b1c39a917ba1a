"""CORE: how well a base model answers tasks that it was not trained for, from a few examples shown in its context.

Each task's accuracy is centred by what guessing scores, (accuracy − baseline) / (1 − baseline), and CORE is the mean
over the tasks. Multiple choice and schemas are answered by the sequence whose scored tokens have the lowest mean loss,
language modelling by whether all of them were the likeliest. Rows, draws and spans are nanochat's, so scores compare.
Start reading at `core`; prompts are made in core_prompts.py, losses in core_batches.py (ours) or core_hf.py (others').
Source: Li et al., DataComp-LM, arXiv:2406.11794.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from nanochat.errors import UserError
from nanochat.evaluate.bundle import Bundle, CoreTask, Row
from nanochat.evaluate.core_batches import Score
from nanochat.evaluate.core_controls import CONTROLS
from nanochat.evaluate.core_prompts import Example, Ids, example, prompts
from nanochat.evaluate.intervals import combined, wilson
from nanochat.ranks import gathered

SHUFFLE_SEED = 1337  # of a task's rows, before the first ones are taken


class Model(Protocol):
    """What is asked. limit: tokens of the longest sequence, beyond which it is cropped from the left."""

    limit: int

    def encode(self, texts: list[str]) -> list[Ids]:
        """Ids of each text, with what begins a document before."""
        ...

    def score(self, examples: Iterable[Example]) -> Iterator[list[Score]]:
        """The scores of each example's sequences, in order."""
        ...


@dataclass(frozen=True)
class Answers:
    """Of one task: whether each row was answered rightly, and how many rows were cropped."""

    right: list[bool]
    cropped: int

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class Step:
    """What there is to say about progress. Of `share` of all work after `seconds`; result: when a task is over."""

    number: int
    of: int
    label: str
    done: int
    rows: int
    share: float
    seconds: float
    result: dict[str, Any] | None = None

    @property
    def left(self) -> float:
        """Seconds, if it goes on like this."""
        return self.seconds * (1 - self.share) / max(self.share, 1e-9)


def core(
    model: Model,
    bundle: Bundle,
    max_per_task: int = -1,
    controls: Sequence[str] = (),
    on_step: Callable[[Step], None] = lambda step: None,
) -> dict[str, Any]:
    """Asks all tasks of a bundle, spread over the ranks, and returns what a run's summary keeps of it:

    tasks {label: accuracy, centered, n, low, high (Wilson, of the accuracy), baseline, cropped}, core with its low and
    high, partial, missing (labels), failed {label: why}, max_per_task, controls {name: {label: accuracy}}. A task that
    fails counts as missing. Raises UserError where there is nothing to average, or max_per_task is too small.
    """
    check(bundle, max_per_task)
    asked = [(name, task) for name in ("", *controls) for task in bundle.tasks]
    work = [work_of(task, name, max_per_task) for name, task in asked]
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in ("", *controls)}
    failed: dict[str, str] = {}
    started = time.monotonic()
    for i, (name, task) in enumerate(asked):
        label = f"{task.label}, {name}" if name else task.label

        def tick(done: int, rows: int, result: dict[str, Any] | None = None) -> None:
            share = (sum(work[:i]) + work[i] * done / max(rows, 1)) / sum(work)  # noqa: B023 (called within the turn)
            on_step(Step(i + 1, len(asked), label, done, rows, share, time.monotonic() - started, result))  # noqa: B023

        answers = answer(model, task, name, max_per_task, tick)
        if isinstance(answers, str):
            failed[label] = answers
            tick(1, 1, dict(failed=answers))
        else:
            results[name][task.label] = found = numbers(task, answers)
            tick(1, 1, found)
    tasks = results.pop("")
    if not tasks:
        why = "; ".join(f"{label}: {reason}" for label, reason in failed.items()) or "the bundle has none"
        raise UserError(f"no CORE task could be scored ({why})")
    bounds = []
    for one in tasks.values():
        low, high = (centred(one[key], one["baseline"]) for key in ("low", "high"))
        bounds.append((one["centered"], low, high))
    score, low, high = combined(bounds)
    missing = [*bundle.missing, *(task.label for task in bundle.tasks if task.label not in tasks)]
    accuracies = {name: {label: one["accuracy"] for label, one in found.items()} for name, found in results.items()}
    return dict(
        tasks=tasks, core=score, low=low, high=high, partial=bool(missing), missing=missing, failed=failed,
        max_per_task=max_per_task, controls=accuracies,
    )  # fmt: skip


def check(bundle: Bundle, max_per_task: int) -> None:
    """Raises UserError where so few rows of each task leave none to ask beside those shown."""
    most = max((task.shots for task in bundle.tasks), default=0)
    if 0 < max_per_task <= most:
        raise UserError(f"--max-per-task is {max_per_task}, wanted at least {most + 1}: up to {most} more are shown")


def work_of(task: CoreTask, control: str, max_per_task: int) -> float:
    """About how much there is to compute: the bytes of the rows, each asked once and shown in as many others."""
    text = task.path.read_bytes()
    rows = text.count(b"\n") + 1
    asked = max(1, len(text)) * min(1.0, max_per_task / rows if max_per_task > 0 else 1.0)
    return asked * (1 if control == "removed" else 1 + task.shots)


def centred(accuracy: float, baseline: float) -> float:
    """0 for guessing, 1 for all right."""
    return (accuracy - baseline) / (1 - baseline)


def numbers(task: CoreTask, answers: Answers) -> dict[str, Any]:
    low, high = wilson(sum(answers.right), len(answers.right))
    baseline = 0.01 * task.baseline
    return dict(
        accuracy=answers.accuracy, centered=centred(answers.accuracy, baseline), n=len(answers.right), low=low,
        high=high, baseline=baseline, cropped=answers.cropped,
    )  # fmt: skip


def chosen(task: CoreTask, max_per_task: int = -1) -> list[Row]:
    """A task's rows in the order they are asked in; the first max_per_task of them where that is positive."""
    rows = task.rows()
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return rows[:max_per_task] if max_per_task > 0 else rows


def answer(
    model: Model,
    task: CoreTask,
    control: str = "",
    max_per_task: int = -1,
    tick: Callable[[int, int], None] = lambda done, rows: None,
) -> Answers | str:
    """One task, each rank its share of the rows; why not, where a rank failed."""
    right: dict[int, bool] = {}
    cropped, why, count = 0, "", 0
    try:
        rows = chosen(task, max_per_task)
        if control:
            task, rows = CONTROLS[control](task, rows)
        count = len(rows)
        mine = share(task, rows)
        lost: list[bool] = []

        def examples() -> Iterator[Example]:
            for index in mine:
                made = example(task, rows, index, model.encode, model.limit)
                lost.append(made.cropped)
                yield made

        for index, scores in zip(mine, model.score(examples())):
            right[index] = is_right(task, rows[index], scores)
            tick(len(right), len(mine))
        cropped = sum(lost)
    except Exception as problem:  # memory, a damaged file, a model's own check: the other tasks go on
        why = str(problem).strip() or type(problem).__name__
        why = why if isinstance(problem, UserError) else f"{type(problem).__name__}: {why.splitlines()[0]}"
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        found = gathered((right, cropped, why), dist.get_world_size())
        right = {index: one for part, _, _ in found for index, one in part.items()}
        cropped = sum(part[1] for part in found)
        why = next((part[2] for part in found if part[2]), "")
    return why or Answers([right[index] for index in range(count)], cropped)


def share(task: CoreTask, rows: Sequence[Row]) -> list[int]:
    """The rows that this rank answers, the longest first, so that ranks have equally much to do; of one, all."""
    world, rank = 1, 0
    if dist.is_available() and dist.is_initialized():
        world, rank = dist.get_world_size(), dist.get_rank()
    size = [max(map(len, prompts(task, rows, index))) for index in range(len(rows))]  # characters
    order = sorted(range(len(rows)), key=lambda index: (-size[index], index))
    loads, mine = [0] * world, []
    for index in order:
        least = loads.index(min(loads))
        loads[least] += size[index]
        if least == rank:
            mine.append(index)
    return mine


def is_right(task: CoreTask, row: Row, scores: Sequence[Score]) -> bool:
    if task.kind == "language_modeling":
        return scores[0].right
    best = min(range(len(scores)), key=lambda i: scores[i].mean)  # the first of equals, and NaN where it is the first
    return best == row["gold"]
