"""Two recordings side by side: which categories and kernels got slower or faster, in ms of a step."""

import argparse
import json
from pathlib import Path
from typing import Any

from nanochat import render
from nanochat.errors import UserError
from nanochat.files import json_of
from nanochat.render import Section, Table
from profiling.recorded.analysis import Analysis

ROWS = 20  # kernels
LEAST = 0.01  # of a step: smaller differences than a hundredth of the largest are not listed


def load(path: Path) -> Analysis:
    """A profile.json. Raises UserError for anything else, and for one of another version."""
    try:
        content = json_of(path.read_bytes())
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}); give two profile.json") from None
    except ValueError:
        raise UserError(f"{path} is no JSON; give the profile.json that lies beside a trace's page") from None
    return Analysis.load(content, str(path))


def compare(a: Analysis, b: Analysis) -> dict[str, list[dict[str, Any]]]:
    """Rows of name, a_ms, b_ms and change_ms per step: of categories (idle and the whole among them), of kernels.

    Raises UserError when one was recorded on a device and the other not.
    """
    if a.on_device != b.on_device:
        raise UserError("one of the two was recorded on a GPU and the other on a CPU: their kernels are not the same")

    def rows(first: dict[str, int], second: dict[str, int]) -> list[dict[str, Any]]:
        made = []
        for name in dict.fromkeys([*first, *second]):
            one, two = first.get(name, 0) / 1e6 / a.steps, second.get(name, 0) / 1e6 / b.steps
            made.append(dict(name=name, a_ms=one, b_ms=two, change_ms=two - one))
        return sorted(made, key=lambda row: -abs(row["change_ms"]))

    def kernels(found: Analysis) -> dict[str, int]:
        sums: dict[str, int] = {}
        for row in found.ops:
            sums[row["name"]] = sums.get(row["name"], 0) + row["ns"]
        return sums

    whole = [{**x.category_ns, "idle": x.idle_ns, "step": x.wall_ns} for x in (a, b)]
    return dict(categories=rows(*whole), kernels=rows(kernels(a), kernels(b)))


def sections(changes: dict[str, list[dict[str, Any]]]) -> list[Section]:
    made = []
    for what, rows in changes.items():
        listed = [row for row in rows if abs(row["change_ms"]) >= LEAST * abs(rows[0]["change_ms"])][:ROWS]
        lines = [
            (row["name"], f"{row['a_ms']:,.3f}", f"{row['b_ms']:,.3f}", f"{row['change_ms']:+,.3f}") for row in listed
        ]
        made.append(Section(what, [Table(("", "A, ms of a step", "B", "B − A"), lines)]))
    return made


def main() -> None:
    """`python -m profiling diff`."""
    parser = argparse.ArgumentParser(description="Two profile.json side by side.")
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    flags = parser.parse_args()
    changes = compare(load(flags.a), load(flags.b))
    print(render.markdown(f"A: {flags.a}, B: {flags.b}", sections(changes)))
    print(json.dumps(changes))
