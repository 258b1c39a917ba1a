"""Chapter 4: who sees whom."""

import torch

from kernels import flash_attention
from nanochat.cost import attended
from nanochat.course.chapter import Chapter, number
from nanochat.recipe import model_config

T, WINDOW, DEPTH = 12, 3, 12


def seen(window: int | None) -> list[str]:
    """A line per query, # where it sees a key: values that are one-hot come out as the weights of the keys."""
    q = torch.zeros(1, T, 1, T)
    weights = flash_attention(q, q, torch.eye(T).view(1, T, 1, T), window=window)[0, :, 0]  # (T, T)
    return ["".join("#" if weight > 0 else "." for weight in row) for row in weights]


def picture() -> str:
    lines = [f"{'query':8}{'all before':{T + 4}}a window of {WINDOW}"]
    for i, (full, short) in enumerate(zip(seen(None), seen(WINDOW))):
        lines.append(f"{i:<8}{full:{T + 4}}{short}")
    return "\n".join(lines)


def check(answer: str) -> str:
    value, config = number(answer), model_config(DEPTH, 32768)
    length = config.sequence_len
    windows = [config.window(layer) for layer in range(DEPTH)]
    pairs = lambda most: most * (most + 1) // 2 + (length - most) * most
    if value == round(attended(config) * length):
        return ""
    if value == sum(pairs(length if w is None else w) for w in windows):
        return "Nearly: a window of W sees the query's own key and the W before it. Look at the picture."
    if value == DEPTH * pairs(length):
        return "That is without windows. Which layers have one, and how long is it?"
    if value == sum(length * (length if w is None else w) for w in windows):
        return "So nanochat counts FLOPs. But the first queries of a sequence have fewer keys before them."
    if value in (pairs(length), pairs(513)):
        return f"That is one layer; the model has {DEPTH}."
    return "Count a layer without a window, a layer with one, and how many there are of each."


CHAPTER = Chapter(
    "Attention, and who sees whom",
    f"Depth {DEPTH} as the recipe makes it (`model_config({DEPTH}, 32768)`), one sequence of full length. How "
    "many pairs of "
    "a query and a key that it sees are there, in all layers together (one head)?",
    picture,
    check,
)
