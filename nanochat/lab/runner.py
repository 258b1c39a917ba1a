"""Runs an experiment's grid over its seeds: goes on where it was stopped, never runs a cell twice, yields to others.

The table is written after every cell, so that what was measured is kept however it ends. `go` is where to start.
"""

import json
import os
import sys
import time
from pathlib import Path

from nanochat import locks
from nanochat.errors import UserError
from nanochat.files import write_atomically
from nanochat.lab import claims, table
from nanochat.lab.declaration import Experiment, Findings, Rows
from nanochat.lab.table import Values

TABLE, ENVIRONMENT, FORECAST, NOTE = "table.csv", "environment.json", "forecast.json", "README.md"


def go(name: str, experiment: Experiment, folder: Path, smoke: bool, max_minutes: float | None = None) -> Findings:
    """Runs what is missing, draws, and checks the note. Results are in `folder`.

    Raises UserError when another process runs it, when a forecast has to be committed first, when the time is up, and
    when the note claims what the table does not say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = locks.take(folder / ".lock", locks.holder())
    except locks.Taken as holder:
        raise UserError(f"experiment {name} is being run by {holder}; wait until it ends") from None
    try:
        until = float("inf") if max_minutes is None else time.time() + 60 * max_minutes
        _run_missing(name, experiment, folder, smoke, until)
    finally:
        lock.release()
    return conclude(name, experiment, folder)


def conclude(name: str, experiment: Experiment, folder: Path) -> Findings:
    """Findings of the table as it is, drawn into the folder. Raises UserError as `go` does."""
    rows = table.read(folder / TABLE)
    if not rows:
        raise UserError(f"experiment {name} has no {TABLE} in {folder}; run it")
    findings = found(experiment, rows)
    for file, svg in findings.plots.items():
        write_atomically(folder / file, svg.encode())
    if wrong := claims.wrong(folder / NOTE, {TABLE: findings.claims}):
        raise UserError(f"{folder / NOTE} claims what {TABLE} does not say: {'; '.join(wrong)}")
    return findings


def found(experiment: Experiment, rows: Rows) -> Findings:
    """What the declaration finds in the rows, and how many of its cells they are, under "cells"."""
    findings = experiment.findings(rows)
    whole = len((*experiment.cells, *experiment.held_out)) * len(experiment.seeds)
    return Findings({**findings.claims, "cells": f"{len(rows)} of {whole}"}, findings.plots)


def _run_missing(name: str, experiment: Experiment, folder: Path, smoke: bool, until: float) -> None:
    _run_cells(name, experiment, folder, experiment.smoke_cells if smoke else experiment.cells, smoke, until)
    if not experiment.forecast:
        return
    path = folder / FORECAST
    if not path.exists():
        forecast = experiment.forecast(table.read(folder / TABLE), experiment.smoke if smoke else experiment.size)
        write_atomically(path, (json.dumps(forecast, indent=1) + "\n").encode())
        print(f"{name}: forecast {forecast} written to {path}")
    if not smoke and not registered(path):
        raise UserError(f"{path} is not committed; commit it, then the same command runs what it forecasts")
    _run_cells(name, experiment, folder, experiment.held_out, smoke, until)


def registered(path: Path) -> bool:
    """Whether the file is committed as it is."""
    known = table.git(path.parent, "log", "-1", "--format=%H", "--", path.name)
    return bool(known) and not table.git(path.parent, "status", "--porcelain", "--", path.name)


def _run_cells(
    name: str, experiment: Experiment, folder: Path, cells: tuple[Values, ...], smoke: bool, until: float
) -> None:
    rows: Rows = table.read(folder / TABLE)
    seeds = experiment.seeds[: experiment.smoke_seeds] if smoke else experiment.seeds
    grid = [(cell, seed) for seed in seeds for cell in cells]
    todo = [(cell, seed) for cell, seed in grid if not table.has(rows, cell, seed)]
    if not todo:
        return
    if not smoke:
        os.nice(10)
    at = table.commit(folder)
    table.note_environment(folder / ENVIRONMENT, at)
    for i, (cell, seed) in enumerate(todo):
        if time.time() > until:
            raise UserError(f"experiment {name}: the time is up with {len(todo) - i} cells left; run it again to go on")
        started = time.perf_counter()
        measured = experiment.run(cell, seed, experiment.smoke if smoke else experiment.size)
        seconds = round(time.perf_counter() - started, 2)
        rows.append({**cell, "seed": seed, **measured, "seconds": seconds, "commit": at})
        table.write(folder / TABLE, rows)
        said = " ".join(f"{key} {value:.5g}" for key, value in measured.items() if isinstance(value, int | float))
        print(f"{name} {i + 1}/{len(todo)}: {words(cell)} seed {seed}: {said} ({seconds:.0f} s)", file=sys.stderr)


def words(cell: Values) -> str:
    return ", ".join(f"{name} {value}" for name, value in cell.items())
