"""What an experiment is: a folder `experiments/NAME/` whose `declaration.py` defines EXPERIMENT, before anything runs.

Beside it stand what the runner makes (table.csv, environment.json, plots) and the note, README.md.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.lab.table import Value, Values

FOLDER = Path(__file__).parents[2] / "experiments"
Rows = list[dict[str, Value]]


@dataclass(frozen=True)
class Findings:
    """What a table says. claims: by name, as text for the note. plots: SVG files by name."""

    claims: Mapping[str, str]
    plots: Mapping[str, str]


@dataclass(frozen=True)
class Experiment:
    """Written down and committed before it runs.

    cells: the grid; each is run with each seed. run(cell, seed, size): measures one; `size` is what all have in common.
    held_out: cells that run only after `forecast(rows of the others, size)` was written and committed.
    smoke: the size, smoke_cells the cells, smoke_seeds how many seeds, of a run that shows in seconds that it works.
    """

    question: str
    hypothesis: str
    refuted_by: str
    metric: str
    budget: str
    cells: tuple[Values, ...]
    seeds: tuple[int, ...]
    run: Callable[[Values, int, Mapping[str, Any]], dict[str, Value]]
    findings: Callable[[Rows], Findings]
    size: Mapping[str, Any]
    smoke: Mapping[str, Any]
    smoke_cells: tuple[Values, ...]
    smoke_seeds: int = 1
    held_out: tuple[Values, ...] = ()
    forecast: Callable[[Rows, Mapping[str, Any]], dict[str, float]] | None = None


def names() -> list[str]:
    return sorted(path.parent.name for path in FOLDER.glob("*/declaration.py"))


def load(name: str) -> Experiment:
    """Raises UserError for a name that no declared experiment has."""
    if name not in names():
        raise UserError(f"there is no experiment {name!r} in {FOLDER}; there are {', '.join(names())}")
    return importlib.import_module(f"experiments.{name}.declaration").EXPERIMENT
