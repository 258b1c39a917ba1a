"""What a model reads for an example of a CORE task, and which of its tokens are scored.

Multiple choice: the question followed by each choice; a choice's own tokens are scored, from where the choices first
differ. Schema: each context followed by the same continuation; the tokens that all end with are scored. Language
modelling: the continuation is scored. Before it stand `shots` solved examples, drawn with a seed of the example's own,
each followed by a blank line. Spans and draws are nanochat's (github.com/karpathy/nanochat), so scores compare.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanochat.evaluate.bundle import CoreTask, Row

Ids = list[int]


@dataclass(frozen=True)
class Example:
    """Token sequences to be compared, each with the span [start, end) of its scored tokens; gold: the right one.

    Of a language-modelling example there is one sequence, and gold is 0. cropped: a sequence lost its beginning.
    """

    ids: list[Ids]
    spans: list[tuple[int, int]]
    gold: int = 0
    cropped: bool = False


def prompts(task: CoreTask, rows: Sequence[Row], index: int) -> list[str]:
    """The texts of an example: one for each choice or context; of language modelling without and with the answer."""
    row, delimiter = rows[index], task.delimiter
    others = [i for i in range(len(rows)) if i != index]
    drawn = random.Random(task.seed + index).sample(others, task.shots) if task.shots else []
    shown = "".join(_solved(task, rows[i]) + "\n\n" for i in drawn)
    if task.kind == "multiple_choice":
        return [f"{shown}{row['query']}{delimiter}{choice}" for choice in row["choices"]]
    if task.kind == "schema":
        return [f"{shown}{context}{delimiter}{row['continuation']}" for context in row["context_options"]]
    question = f"{shown}{row['context'].strip()}{delimiter}"
    # A blank at the end would be part of the answer's first token: without it, the one is a beginning of the other.
    return [question.rstrip(), question + row["continuation"]]


def _solved(task: CoreTask, row: Row) -> str:
    if task.kind == "multiple_choice":
        return f"{row['query']}{task.delimiter}{row['choices'][row['gold']]}"
    if task.kind == "schema":
        return f"{row['context_options'][row['gold']]}{task.delimiter}{row['continuation']}"
    return f"{row['context'].strip()}{task.delimiter}{row['continuation']}"


def example(
    task: CoreTask, rows: Sequence[Row], index: int, encode: Callable[[list[str]], list[Ids]], limit: int | None
) -> Example:
    """Tokens and spans. encode: texts to ids, with what begins a document before; limit: tokens of a sequence, beyond
    which it is cropped from the left (None: none).
    """
    ids = encode(prompts(task, rows, index))
    if task.kind == "multiple_choice":
        start = shared(ids)
        spans = [(start, len(one)) for one in ids]
    elif task.kind == "schema":
        same = shared([one[::-1] for one in ids])
        spans = [(len(one) - same, len(one)) for one in ids]
    else:
        start = shared(ids)  # all of the question, but for a tokenizer that joins its end with the answer's beginning
        ids = ids[1:]
        spans = [(start, len(ids[0]))]
    kept, moved = zip(*(_crop(one, span, limit) for one, span in zip(ids, spans)))
    gold = 0 if task.kind == "language_modeling" else rows[index]["gold"]
    return Example(list(kept), list(moved), gold, [len(one) for one in kept] != [len(one) for one in ids])


def _crop(ids: Ids, span: tuple[int, int], limit: int | None) -> tuple[Ids, tuple[int, int]]:
    lost = max(0, len(ids) - limit) if limit else 0
    return ids[lost:], (max(span[0] - lost, 1), span[1] - lost)  # the first token is predicted by nothing


def shared(sequences: Sequence[Ids]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(sequences), max(sequences)  # in dictionary order what these share, all share
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
