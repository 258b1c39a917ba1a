"""An experiment's table: one CSV row a cell and seed, with the commit that measured it; and where that was."""

import csv
import io
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from nanochat.files import write_atomically
from nanochat.hardware import device_name, pick
from nanochat.processes import git

Value = str | int | float
Values = Mapping[str, Value]


def read(path: Path) -> list[dict[str, Value]]:
    """The rows, numbers as numbers; [] where there is no file yet."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return [{name: value_of(text) for name, text in row.items()} for row in csv.DictReader(f)]


def write(path: Path, rows: Iterable[Values]) -> None:
    """Replaces the file; a row that lacks a column has it empty."""
    rows = list(rows)
    head = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, head, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: shown(value) for name, value in row.items()} for row in rows)
    write_atomically(path, text.getvalue().encode())


def shown(value: Value) -> Value:
    """Six digits are more than any run repeats on another machine."""
    return f"{value:.6g}" if isinstance(value, float) else value


def value_of(text: str) -> Value:
    if text.startswith("="):  # outcomes of questions, a digit each: no number
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def has(rows: Iterable[Values], cell: Values, seed: int) -> bool:
    """Whether the cell was run with this seed."""
    return any(row["seed"] == seed and matches(row, cell) for row in rows)


def matches(row: Values, cell: Values) -> bool:
    return all(row.get(name) == value for name, value in cell.items())


def commit(folder: Path) -> str:
    """Short hash of the checkout, "+" behind it where code or declarations differ; "" where it is none."""
    head = git(folder, "rev-parse", "--short=10", "HEAD")
    changed = git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
    return head + ("+" if head and changed else "")


def note_environment(path: Path, at: str) -> None:
    """Adds this machine to the file, under the commit that its rows carry."""
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    here = dict(
        machine=device_name(torch.device(pick("", 0))), cores=os.cpu_count(), threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}", python=platform.python_version(), torch=torch.__version__,
    )  # fmt: skip
    write_atomically(path, (json.dumps({**known, at: here}, indent=1) + "\n").encode())
