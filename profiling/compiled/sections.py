"""The page about a compiled step: sums, side by side where there are two; memory; suspects; every launch in order."""

from collections import Counter
from typing import Any

from nanochat.render import Curve, Section, Table
from profiling.predicted.cards import Card
from profiling.predicted.predict import time_text

COPIES, NOT_STREAMING = "casts, copies, fills", ("matrix products", "attention")
LINES = 40  # rows of a table of sums


def micro_step(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One forward and one backward: the second micro-batch's, in which gradients are added to those of the first."""
    return [row for row in found["launches"] if row["phase"].endswith("2")]


def totals(found: dict[str, Any]) -> dict[str, float]:
    """Of a forward and a backward: launches, bytes (streaming: all but products and attention), FLOPs, time; peak."""
    rows = micro_step(found)
    return dict(
        launches=len(rows),
        gigabytes=sum(row["bytes"] for row in rows) / 1e9,
        streaming_gigabytes=sum(row["bytes"] for row in rows if row["category"] not in NOT_STREAMING) / 1e9,
        teraflops=sum(row["flops"] for row in rows) / 1e12,
        predicted_ms=1e3 * sum(row["predicted_s"] for row in rows),
        peak_gib=max(phase["peak"] for phase in found["memory"].values()) / 2**30,
    )


def sections(variants: dict[str, dict[str, Any]], chip: Card) -> list[Section]:
    """variants: setting of the kernels → what report.py's `measured` gives."""
    made = [summary(variants, chip), sums("By category", "category", variants), sums("By line", "line", variants)]
    for name, found in variants.items():
        made += [memory(name, found), suspects(name, found), launches(name, found)]
    return made


def summary(variants: dict[str, dict[str, Any]], chip: Card) -> Section:
    sides = {name: totals(found) for name, found in variants.items()}
    rows = [
        (what.replace("_", " "), *(f"{side[what]:,.4g}" for side in sides.values()))
        for what in next(iter(sides.values()))
    ]
    return Section("A forward and a backward", [
        f"Inductor's own code for a {chip.name}, run on fake tensors; no card was involved. Times are PREDICTED "
        f"({chip.constants}): bytes over bandwidth or FLOPs over the rate of products, and a launch each.",
        Table(("", *sides), rows),
    ])  # fmt: skip


def sums(title: str, key: str, variants: dict[str, dict[str, Any]]) -> Section:
    """Launches, bytes and predicted time of a micro-step by category or line."""
    tables: dict[str, dict[str, Counter[str]]] = {}
    for name, found in variants.items():
        for row in micro_step(found):
            cell = tables.setdefault(row[key] or "not known", {}).setdefault(name, Counter())
            cell.update(launches=1, bytes=row["bytes"], ns=round(1e9 * row["predicted_s"]))
    ordered = sorted(tables.items(), key=lambda item: -max(cell["bytes"] for cell in item[1].values()))
    rows = []
    for label, cells in ordered[:LINES]:
        numbers = [label]
        for name in variants:
            cell = cells.get(name, Counter())
            numbers += [f"{cell['launches']}", f"{cell['bytes'] / 1e9:,.2f}", f"{cell['ns'] / 1e6:,.2f}"]
        rows.append(numbers)
    head = [key, *(f"{name}: {what}" for name in variants for what in ("launches", "GB", "predicted ms"))]
    return Section(title, [Table(head, rows)])


def memory(name: str, found: dict[str, Any]) -> Section:
    phase, at = max(found["memory"].items(), key=lambda item: item[1]["peak"])
    kinds = [(kind, f"{size / 2**30:,.2f}") for kind, size in at["kinds"].items()]
    blocks = [(f"{size / 2**30:,.2f}", f"{count}", kind, line) for size, count, kind, line in at["blocks"][:LINES]]
    return Section(f"Memory: {name}", [
        f"The most is allocated in {phase}: {at['peak'] / 2**30:,.2f} GiB.",
        Curve("GiB allocated over the step", [(i, size / 2**30) for i, size in enumerate(found["curve"])]),
        Table(("alive then", "GiB"), kinds),
        Table(("GiB", "blocks", "kind", "made by"), blocks),
    ])  # fmt: skip


def suspects(name: str, found: dict[str, Any]) -> Section:
    """Kernels that compute nothing, read less than 16 bytes at a time, spill, or compute in float64."""
    rows: Counter[tuple[str, str, str]] = Counter()
    moved: Counter[tuple[str, str, str]] = Counter()
    for row in micro_step(found):
        for why in reasons(row, found["kernels"].get(row["kernel"], {})):
            rows[row["name"], why, row["line"]] += 1
            moved[row["name"], why, row["line"]] += row["bytes"]
    lines = [(*key, f"{rows[key]}", f"{size / 1e9:,.3f}") for key, size in moved.most_common(LINES)]
    return Section(
        f"Suspects: {name}", [Table(("launch", "why", "line", "times", "GB"), lines)] if lines else ["None."]
    )


def reasons(row: dict[str, Any], kernel: dict[str, Any]) -> list[str]:
    found = ["computes nothing"] if row["category"] == COPIES else []
    if kernel.get("error"):
        return [*found, f"does not compile: {kernel['error']}"]
    if kernel.get("access_bytes") and kernel["access_bytes"] < 16 and row["bytes"] >= 32e6:
        found.append(f"{kernel['access_bytes']} bytes at a time")
    if kernel.get("spill_bytes"):
        found.append(f"spills {kernel['spill_bytes']} bytes")
    if kernel.get("float64_instructions"):
        found.append("float64")
    return found


def launches(name: str, found: dict[str, Any]) -> Section:
    """All of the step, in order."""
    rows = []
    for row in found["launches"]:
        kernel = found["kernels"].get(row["kernel"], {})
        time = f"≥ {time_text(row['predicted_s'])}" if row["lower_bound"] else time_text(row["predicted_s"])
        rows.append((
            row["phase"], row["name"], row["line"], row["category"], f"{row['bytes'] / 1e6:,.1f}",
            f"{row['flops'] / 1e9:,.1f}" if row["flops"] else "–", row["bound"],
            f"{time} ±{row['band']:.0%}", f"{kernel.get('registers') or '–'}", f"{kernel.get('spill_bytes') or 0}",
            f"{kernel.get('access_bytes') or '–'}",
        ))  # fmt: skip
    head = (
        "phase",
        "launch",
        "line",
        "category",
        "MB",
        "GFLOP",
        "bound",
        "predicted",
        "registers",
        "spilled",
        "bytes at a time",
    )
    return Section(f"Every launch: {name}", [Table(head, rows)])
