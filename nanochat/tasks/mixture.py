"""Sequences of conversations put together: one after the other, or mixed into a source to train on."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from nanochat.data.conversations import UNIT

Parts = dict[str, tuple[Sequence[dict], int]]  # by name: conversations, epochs


class InOrder(Sequence[dict]):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[dict]]):
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} conversations")
        part = bisect_right(self.ends, index)
        return self.parts[part][index - self.ends[part]]  # from the part's end: −len(part) … −1


class Mixture:
    """A source (nanochat/data/source.py) of several parts, all mixed by a fixed permutation."""

    def __init__(self, name: str, train: Parts, val: Parts):
        self.name = name
        self.items = {
            split: InOrder([rows for rows, epochs in parts.values() for _ in range(epochs)])
            for split, parts in (("train", train), ("val", val))
        }
        self.order = {split: np.random.default_rng(42).permutation(len(items)) for split, items in self.items.items()}
        content = [(name, epochs, len(rows), rows[0], rows[len(rows) - 1]) for name, (rows, epochs) in train.items()]
        self.fingerprint = hashlib.sha256(str(content).encode()).hexdigest()[:16]

    def units(self, split: str) -> int:
        return -(-len(self.order[split]) // UNIT)

    def load(self, split: str, unit: int) -> list[Any]:
        return [self.items[split][int(i)] for i in self.order[split][unit * UNIT : (unit + 1) * UNIT]]
