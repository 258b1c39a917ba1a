"""log.jsonl of a stage: one row for each step and one for each validation, whatever was killed in between.

A row is appended when its step is taken, and is on disk before a checkpoint of that step is complete
(nanochat/saving.py). A stage that goes on from a checkpoint drops the rows beyond it, which are made again. Rows that
are damaged or missing all the same are counted aloud: they are for people, and training does not need them.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.files import json_of, write_atomically

LOG = "log.jsonl"
VALIDATION = {"val_bpb", "passes"}  # a row with one of these is of a validation: of text, or of answers (rl.py)
Row = dict[str, Any]


def json_log(
    path: Path, step: int, evaluated: int, evaluations: int, say: Callable[[str], None] = print
) -> Callable[[Row], None]:
    """What appends a row to the file, after it has been put in order: up to `step`, and validations up to `evaluated`.

    evaluations: how many of these there must be. `say` is told what is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, damaged = _parse(path) if step else ([], 0)
    kept = {}
    for row in rows:  # of several for one step the last: it is of the attempt that the checkpoint is from
        validation = bool(row.keys() & VALIDATION)
        if row["step"] <= (evaluated if validation else step):
            kept[row["step"], validation] = row
    write_atomically(path, "".join(json.dumps(kept[key]) + "\n" for key in sorted(kept)).encode())
    missing = [f"{step - _count(kept, False)} of {step} steps"] if _count(kept, False) < step else []
    if _count(kept, True) < evaluations:
        missing.append(f"{evaluations - _count(kept, True)} of {evaluations} validations")
    if missing:
        say(f"note: {path} has no row of {' and of '.join(missing)}; training goes on without them")
    if damaged:
        say(f"note: {path} had {damaged} damaged lines, which are left out")

    written = path.stat().st_size > 0

    def write(row: Row) -> None:
        nonlocal written
        with open(path, "a") as f:
            if written and not f.tell():
                say(f"note: {path} was removed or emptied meanwhile; it begins anew with step {row['step']}")
            f.write(json.dumps(row) + "\n")
        written = True

    return write


def _count(kept: dict[tuple[int, bool], Row], validation: bool) -> int:
    return sum(1 for key in kept if key[1] == validation)


def read_log(path: Path, aloud: bool = True) -> list[Row]:
    """The rows of a log. Damaged lines are passed over aloud; a last one that is just being written, silently."""
    rows, damaged = _parse(path)
    if damaged and aloud:
        print(f"warning: {path} has {damaged} damaged lines, which are passed over", file=sys.stderr)
    return rows


def _parse(path: Path) -> tuple[list[Row], int]:
    """(rows, how many lines before the last are none)."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    found = [_row(line) for line in lines if line.strip()]
    cut_off = bool(lines and lines[-1].strip() and found[-1] is None)
    return [row for row in found if row is not None], found.count(None) - cut_off


def _row(line: bytes) -> Row | None:
    try:
        row = json_of(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not row.keys() & {"loss", *VALIDATION}:
        return None
    plain = all(type(row.get(name, 0)) in (int, float) for name in ("loss", "smooth_loss", "val_bpb"))
    return row if plain else None
