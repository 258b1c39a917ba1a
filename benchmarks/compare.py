"""Two result files of `python -m benchmarks run` side by side: what got faster or slower, beyond noise.

A change counts where the middle halves of the samples do not overlap and the medians are more than LEAST apart: two
runs on one idle machine differ by a little, whatever was changed.
"""

import math
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.files import json_of

FORMAT = 1  # of the result file; raised when a row means something else than before
LEAST = 0.03
KEY = ("op", "setting", "case", "way", "dtype", "contender")


def load(path: str) -> dict[str, Any]:
    """A result file. Raises UserError for one that is missing, damaged, or of another version."""
    try:
        result = json_of(Path(path).read_bytes())
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is no JSON; run the benchmark again") from None
    if not isinstance(result, dict) or "format" not in result:
        raise UserError(f"{path} is no result of `python -m benchmarks run`: it has no format number")
    if result["format"] != FORMAT:
        raise UserError(
            f"{path} has format {result['format']}, wanted {FORMAT}; run the benchmark again with this code"
        )
    where, rows = result.get("environment"), result.get("rows")
    if not isinstance(where, dict) or not isinstance(where.get("machine"), str) or not isinstance(rows, list):
        raise UserError(f"{path} is damaged: it lacks its rows, or the machine it was made on; run the benchmark again")
    try:
        for row in rows:
            key = [row[part] for part in KEY]
            if not all(isinstance(part, str) for part in [*key, row["status"], row["why"]]):
                raise ValueError
            if row["status"] == "timed" and not all(0 < row[f"{q}_ms"] < math.inf for q in ("q1", "median", "q3")):
                raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: a row of it is not complete; run the benchmark again") from None
    return result


def warnings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What makes the two hard to compare."""
    a, b = before["environment"], after["environment"]
    found = []
    if a["machine"] != b["machine"]:
        found.append(f"these are different machines ({a['machine']}; {b['machine']}): the ratios are not of the code")
    if "smoke" in (before.get("profile"), after.get("profile")):
        found.append("the smoke profile's shapes and repeats are too few to say anything about speed")
    for key in ("torch", "triton", "driver", "threads"):
        if a.get(key) != b.get(key):
            found.append(f"{key} is {a.get(key)} in the one and {b.get(key)} in the other")
    return found


def compared(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each that both have timed: ratio is after's time over before's; change is "", "faster" or "slower"."""
    old = {tuple(row[part] for part in KEY): row for row in before["rows"] if row["status"] == "timed"}
    found = []
    for row in after["rows"]:
        key = tuple(row[part] for part in KEY)
        if row["status"] != "timed" or key not in old:
            continue
        was = old[key]
        ratio = row["median_ms"] / was["median_ms"]
        apart = row["q1_ms"] > was["q3_ms"] or row["q3_ms"] < was["q1_ms"]
        change = "" if not apart or abs(ratio - 1) <= LEAST else "slower" if ratio > 1 else "faster"
        found.append(dict(zip(KEY, key), before_ms=was["median_ms"], after_ms=row["median_ms"], ratio=ratio,
                          change=change))  # fmt: skip
    return found


def broken(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What was timed before and fails now."""
    old = {tuple(row[part] for part in KEY) for row in before["rows"] if row["status"] == "timed"}
    failed = [row for row in after["rows"] if row["status"] == "failed" and tuple(row[part] for part in KEY) in old]
    return [f"{row['op']} {row['case']} {row['way']}, {row['contender']}: {row['why']}" for row in failed]


def report(first: str, second: str) -> dict[str, Any]:
    """Prints the table of changes; returns everything."""
    before, after = load(first), load(second)
    rows = compared(before, after)
    for said in warnings(before, after):
        print(f"warning: {said}")
    if not rows:
        raise UserError(f"{first} and {second} have nothing in common that both have timed")
    print("| op | case | way | who | before, ms | after, ms | after/before | |\n|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: -abs(math.log(row["ratio"]))):
        name = " ".join(filter(None, (row["op"], row["setting"])))
        print(
            f"| {name} | {row['case']} | {row['way']} | {row['contender']} | {row['before_ms']:.4g} "
            f"| {row['after_ms']:.4g} | {row['ratio']:.3f} | {row['change'] or 'within noise'} |"
        )
    for said in broken(before, after):
        print(f"failed now: {said}")
    changes = {name: sum(row["change"] == name for row in rows) for name in ("faster", "slower")}
    print(f"{len(rows)} compared: {changes['faster']} faster, {changes['slower']} slower, the others within noise.")
    return dict(rows=rows, warnings=warnings(before, after), failed=broken(before, after), **changes)
