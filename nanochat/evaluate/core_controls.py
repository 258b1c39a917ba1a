"""The same CORE tasks with something taken away, so that a reader sees what of a score is form and what is knowledge.

    shuffled   the words of every question (of a schema: of what its contexts have in common) in random order, in the
               examples shown too; choices and continuations stay. What is left: topic, and the form of answers.
    removed    no examples shown, and no question: a choice, or a schema's own words, after the delimiter alone. What
               is left: how likely an answer is by itself.
    labels     right answers dealt anew among the task's rows (with equally many choices), shown and graded alike. What
               is left: a liking for answers that are frequent. An answer may keep its row by chance.

All are the same on every run. Random labels: Min et al., arXiv:2202.12837; answers without questions: Gururangan et
al., arXiv:1803.02324.
"""

import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from nanochat.evaluate.bundle import CoreTask, Row

SEED = 4321
Control = Callable[[CoreTask, Sequence[Row]], tuple[CoreTask, list[Row]]]


def shuffled(task: CoreTask, rows: Sequence[Row]) -> tuple[CoreTask, list[Row]]:
    draws = random.Random(SEED)

    def mixed(text: str) -> str:
        words = re.findall(r"\S+", text)
        draws.shuffle(words)
        left = iter(words)
        return re.sub(r"\S+", lambda _: next(left), text)  # spaces and line ends stay where they are

    return task, [_changed(task, row, mixed) for row in rows]


def removed(task: CoreTask, rows: Sequence[Row]) -> tuple[CoreTask, list[Row]]:
    return replace(task, shots=0), [_changed(task, row, lambda text: "") for row in rows]


def labels(task: CoreTask, rows: Sequence[Row]) -> tuple[CoreTask, list[Row]]:
    key = "continuation" if task.kind == "language_modeling" else "gold"
    alike = defaultdict(list)  # rows among which answers can be dealt
    for i, row in enumerate(rows):
        options = row.get("choices") or row.get("context_options") or ()
        alike[len(options)].append(i)
    made, draws = list(rows), random.Random(SEED)
    for _, group in sorted(alike.items()):
        for i, answer in zip(group, draws.sample([rows[i][key] for i in group], len(group))):
            made[i] = {**rows[i], key: answer}
    return task, made


CONTROLS: dict[str, Control] = dict(shuffled=shuffled, removed=removed, labels=labels)


def _changed(task: CoreTask, row: Row, change: Callable[[str], str]) -> Row:
    """The row with its question changed."""
    if task.kind == "multiple_choice":
        return {**row, "query": change(row["query"])}
    if task.kind == "language_modeling":
        return {**row, "context": change(row["context"])}
    options = row["context_options"]
    common = re.match(r"(.*\s)?", os.path.commonprefix(options), re.DOTALL)[0]  # type: ignore[index]
    changed = change(common)
    return {**row, "context_options": [changed + one[len(common) :] for one in options]}
