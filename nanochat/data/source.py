"""The one interface of all training data, and how it is read: in an order that can be continued at any place.

A source gives documents (strings) or conversations (dicts) in units: a parquet row group, a block of lines, 128
generated ones. A unit can be loaded by number, so a position is two integers and resuming costs one unit.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nanochat.data import ahead
from nanochat.errors import UserError

BOM = "\ufeff"  # the byte-order mark that Windows puts before a text
MARKS = re.compile(rf"(?:\s*{BOM})+")
# Categories of Unicode whose characters show nothing (blanks, controls, U+200B and others of no width), and letters
# that do not either: fillers of Hangul, the empty pattern of Braille.
INVISIBLE, FILLERS = {"Cc", "Cf", "Zs", "Zl", "Zp"}, "\u115f\u1160\u2800\u3164\uffa0"


class Source(Protocol):
    """Where training data comes from. The splits are "train" and "val"."""

    name: str  # for people: "hub", a path, "microworld"
    fingerprint: str  # changes when the data changes; a run does not resume on other data

    def units(self, split: str) -> int:
        """How many units the split has."""
        ...

    def load(self, split: str, unit: int) -> list[Any]:
        """The items of one unit, always the same."""
        ...


@dataclass(frozen=True)
class Position:
    """The next unit to read: the `unit`-th in the order of the `epoch`-th pass."""

    epoch: int = 0
    unit: int = 0


def read(source: Source, split: str, position: Position, children: int = 0) -> Iterator[tuple[list[Any], Position]]:
    """Yields (items of a unit, position after it) from position on, for ever. children: see ahead.py.

    Training data is shuffled by units, and within a unit, anew in each epoch and the same in every run; validation data
    comes as it is. Raises UserError when a whole pass has no item.
    """
    epoch, start = position.epoch, position.unit
    while True:
        count = source.units(split)
        shuffled = split == "train"
        order = np.random.default_rng(epoch).permutation(count) if shuffled else np.arange(count)
        empty = start == 0
        units = (int(unit) for unit in order[start:])
        for i, items in zip(range(start, count), ahead.loaded(source, split, units, children)):
            if shuffled:
                items = [items[j] for j in np.random.default_rng((epoch, i)).permutation(len(items))]
            empty = empty and not items
            yield items, Position(epoch, i + 1)
        if empty:
            raise UserError(f"{source.name} has nothing in its {split} split")
        epoch, start = epoch + 1, 0


def first_items(source: Source, split: str, count: int) -> list[Any]:
    """The first `count` items of a split in file order, or all if there are fewer."""
    items: list[Any] = []
    for unit in range(source.units(split)):
        items += source.load(split, unit)
        if len(items) >= count:
            break
    return items[:count]


def blank(text: str) -> bool:
    """Whether nothing of a text is to be seen, so that there is nothing to learn from it."""
    text = text.strip()
    return _unseen(text[:100]) and _unseen(set(text))


def _unseen(characters: Iterable[str]) -> bool:
    return all(unicodedata.category(c) in INVISIBLE or c in FILLERS for c in characters)


def unmarked(text: str) -> str:
    """A text without byte-order marks before it, also where blanks stand before them."""
    found = MARKS.match(text)
    return text[found.end() :] if found else text


def texts_of(documents: list[str]) -> list[str]:
    """Those that are not blank, without byte-order marks before them."""
    return [unmarked(document) for document in documents if not blank(document)]
