"""ChatCORE: one number for a chat model, the mean over six tasks of how far each rate is above blind guessing.

A rate is centred: (rate − chance) / (1 − chance), 0 for guessing and 1 for knowing all; ARC and MMLU have a chance of
1/4, the others 0. Of fewer than six tasks it is partial, which no one may compare with a whole one.
"""

from typing import Any

from nanochat.evaluate.intervals import combined
from nanochat.tasks import CHATCORE


def centred(rate: float, chance: float) -> float:
    return (rate - chance) / (1 - chance)


def chatcore(results: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """From results by task (those of TaskResult.numbers): score, its 95% interval (low, high) over the questions,
    whether it is partial, what is missing, and each task's centred rate. None where none of the six is there.
    """
    there = [name for name in CHATCORE if name in results and results[name]["n"]]
    if not there:
        return None
    scores = []
    for name in there:
        found = results[name]
        chance = found.get("chance", 0.0)
        score, low, high = (centred(found[key], chance) for key in ("rate", "low", "high"))
        scores.append((score, low, high))
    score, low, high = combined(scores)
    missing = [name for name in CHATCORE if name not in there]
    return dict(
        score=score, low=low, high=high, partial=bool(missing), missing=missing,
        centred={name: one[0] for name, one in zip(there, scores)},
    )  # fmt: skip


def in_words(core: dict[str, Any]) -> str:
    """What `chatcore` gives, for people."""
    partial = f"; partial, without {', '.join(core['missing'])}" if core["partial"] else ""
    return f"{core['score']:.4f} ({core['low']:.4f} to {core['high']:.4f}{partial})"
