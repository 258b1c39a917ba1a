"""A result file as tables and plots: what `python -m benchmarks run` writes beside its JSON, as Markdown and as a page.

An op has a table (all cases, ways and contenders) and, where there are several sizes, its time by size; before them the
roofline and a summary, after them what was left out and why.
"""

import math
from collections import defaultdict
from typing import Any

from benchmarks import training_step
from nanochat.render import Figure, Section, Table
from profiling import plots

Row = dict[str, Any]
# For up to seven contenders; they can be told apart on white and on black, and by the colour-blind.
COLOURS = ("#2a7de1", "#e07b00", "#1a9850", "#c2459b", "#8c6d46", "#7570b3", "#888888")
BEST = ("triton", "compiled", "eager")  # whose speed stands for ours on a machine: the first that was timed


def sections(result: dict[str, Any]) -> list[Section]:
    rows = result["rows"]
    by_op: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_op[" ".join(filter(None, (row["op"], row["setting"])))].append(row)
    found = [Section("Where and how", about(result))]
    if result["training"]:
        found.append(Section("Training step", training_step.lines(result["training"])))
    found.append(Section("Summary", summary(by_op, result)))
    found += [Section(name, op_blocks(name, its)) for name, its in by_op.items()]
    found.append(Section("Left out", left_out(rows)))
    return found


def about(result: dict[str, Any]) -> list[Any]:
    where, limits = result["environment"], result["limits"]
    gpu = f", driver {where['driver']}, CUDA {where['cuda']}" if where["cuda"] else ""
    text = (
        f"{where['machine']}{gpu}; torch {where['torch']}, Triton {where['triton'] or '–'}, commit "
        f"{where['commit'] or '–'}; profile {result['profile']}, {result['seconds']:.0f} s"
        f"{', stopped before its end' if result.get('stopped') else ''}."
    )
    rate = "unknown peak: no share of a roofline is given"
    if limits["flops"] and limits["bandwidth"]:
        source = "by the data sheet" if where["cuda"] else "measured before the run; what fits the caches can exceed it"
        rate = f"{limits['flops'] / 1e12:.3g} TFLOP/s and {limits['bandwidth'] / 1e9:.3g} GB/s, {source}"
    return [text, f"Roofline: {rate}.", sensors(result["sensors"]), HOW]


HOW = (
    "Contenders take turns and find the caches swept; medians with the middle half of the samples. On a GPU time is "
    "the card's, and graph is a replayed CUDA graph, its L2 cache warm. GB/s and TFLOP/s are of the least bytes and "
    "FLOPs that an op can do with. Every contender passed the accuracy gate, or has no speed."
)


def sensors(found: dict[str, Any]) -> str:
    if not found.get("samples"):
        why = found.get("unavailable", "clocks and power were not read")
        return why[0].upper() + why[1:] + "."
    parts = []
    for key, name, unit in (
        ("sm_clock_mhz", "SM clock", "MHz"), ("power_w", "power", "W"), ("temperature_c", "temperature", "°C")
    ):  # fmt: skip
        if values := found.get(key):
            parts.append(f"{name} {values['median']:.0f} {unit} ({values['min']:.0f} to {values['max']:.0f})")
    return f"During the run: {', '.join(parts)}; throttled by: {', '.join(found['throttle']) or 'nothing'}."


# ---- tables


def number(value: float | None) -> str:
    """Three digits; an en dash for nothing."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def share(row: Row) -> str:
    return "unknown peak" if row["roofline"] is None else f"{row['roofline']:.1%}"


def cells(row: Row, gpu: bool) -> tuple[str, ...]:
    first = (row["case"], row["way"], row["contender"])
    if row["status"] != "timed":
        return (*first, f"failed: {row['why']}", *[""] * (7 if gpu else 5))
    ms = f"{number(row['median_ms'])} ({number(row['q1_ms'])} to {number(row['q3_ms'])})"
    times = f"{row['times_eager']:.2f}" if "times_eager" in row else "–"
    rates = (number(row["gb_per_s"]), number(row["tflop_per_s"]), share(row))
    more = (number(row.get("graph_ms")), number(row["peak_mb"])) if gpu else ()
    return (*first, ms.replace(" ", "\u00a0"), times, *rates, *more, f"{row['gate']['error']:.1e}")


def op_blocks(name: str, rows: list[Row]) -> list[Any]:
    shown = [row for row in rows if row["status"] != "skipped"]
    gpu = any("peak_mb" in row for row in rows)
    head = ("case", "way", "who", "ms", "times eager's speed", "GB/s", "TFLOP/s", "of roofline",
            *(("graph, ms", "MB") if gpu else ()), "error")  # fmt: skip
    blocks: list[Any] = [Table(head, [cells(row, gpu) for row in shown])]
    way = "both" if any(row["way"] == "both" for row in rows) else "forward"
    family = [row for row in shown if row["case"].startswith("d")]  # the model's shapes; odd ones are no sizes of it
    timed = [row for row in family if row["status"] == "timed" and row["way"] == way]
    if len({row["case"] for row in timed}) > 1:
        blocks.append(by_size(f"{name}: time by size, {WAY[way]}", timed))
    return blocks


WAY = dict(forward="forward", both="forward and backward")


def best(rows: list[Row], way: str) -> Row | None:
    """Ours at the largest case: the kernels, or what stands in for them here."""
    timed = [row for row in rows if row["status"] == "timed" and row["way"] == way]
    if not timed:
        return None
    largest = max(timed, key=lambda row: row["least_bytes"])["case"]
    here = {row["contender"]: row for row in timed if row["case"] == largest}
    return next((here[name] for name in BEST if name in here), None)


def summary(by_op: dict[str, list[Row]], result: dict[str, Any]) -> list[Any]:
    """The largest case of each op, the whole of it; and the roofline of its forward."""
    rows, points = [], []
    for i, (name, its) in enumerate(by_op.items(), 1):
        whole = best(its, "both") or best(its, "forward")
        if whole is None:
            rows.append((str(i), name, "–", "–", "no contender passed", "", "", "", ""))
            continue
        others = [row for row in its if row["status"] == "timed" and row is not whole]
        others = [row for row in others if (row["case"], row["way"]) == (whole["case"], whole["way"])]
        rival = min(others, key=lambda row: row["median_ms"]) if others else None
        ratio = f"{rival['median_ms'] / whole['median_ms']:.2f} ({rival['contender']})" if rival else "–"
        times = f"{whole['times_eager']:.2f}" if "times_eager" in whole else "–"
        rows.append((str(i), name, whole["case"], whole["way"], whole["contender"], number(whole["median_ms"]),
                     times, ratio, share(whole)))  # fmt: skip
        points.append((str(i), whole))
    head = (
        "no.",
        "op",
        "case",
        "way",
        "ours here",
        "ms",
        "times eager's speed",
        "times the best other's",
        "of roofline",
    )
    blocks: list[Any] = [Table(head, rows)]
    if points:
        blocks.append(roofline(points, result["limits"]))
    return blocks


def left_out(rows: list[Row]) -> list[Any]:
    """Reasons, and how many rows each concerns; failures in full."""
    reasons: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        if row["status"] == "skipped":
            reasons[row["contender"], row["why"]].add(row["op"])
    failed = sorted(
        {(row["op"], row["case"], row["contender"], row["why"]) for row in rows if row["status"] == "failed"}
    )
    blocks: list[Any] = []
    if failed:
        blocks += ["Failed, so without a speed:", Table(("op", "case", "who", "why"), failed)]
    table = [(who, why, ", ".join(sorted(names))) for (who, why), names in sorted(reasons.items())]
    return [*blocks, Table(("who", "why", "ops"), table)] if table else blocks


# ---- plots


@plots.drawn
def by_size(title: str, rows: list[Row]) -> Figure:
    """Milliseconds over the bytes that a call must move, a line per contender."""
    figure, axes = plots.new_figure(5.0, 3.0)
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        lines[row["contender"]].append(row)
    for colour, (name, its) in zip(COLOURS, lines.items()):
        its.sort(key=lambda row: row["least_bytes"])
        axes.plot([row["least_bytes"] / 1e6 for row in its], [row["median_ms"] for row in its], "o-", color=colour,
                  label=name, markersize=4)  # fmt: skip
    logarithmic(axes, "MB to move at least", "ms")
    axes.legend(frameon=False)
    return Figure(title, plots.svg(figure))


def logarithmic(axes: Any, x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.grid(True, which="major", alpha=0.2, linewidth=0.5)


@plots.drawn
def roofline(points: list[tuple[str, Row]], limits: dict[str, float | None]) -> Figure:
    """TFLOP/s over FLOPs per byte; numbers are the summary's."""
    figure, axes = plots.new_figure(5.0, 3.6)
    at = [(row["least_flops"] / row["least_bytes"], row["tflop_per_s"], label) for label, row in points]
    flops, bandwidth = limits["flops"], limits["bandwidth"]
    if flops and bandwidth:
        low, high = min(x for x, _, _ in at) / 2, max(flops / bandwidth, *(x for x, _, _ in at)) * 3
        xs = [low * (high / low) ** (i / 60) for i in range(61)]
        axes.plot(xs, [min(flops, x * bandwidth) / 1e12 for x in xs], color="#888888", linewidth=1.5)
    axes.plot([x for x, _, _ in at], [y for _, y, _ in at], "o", color=COLOURS[0], markersize=4)
    spot: list[tuple[float, float]] = []
    for x, y, label in sorted(at):
        near = sum(math.hypot(math.log10(x / a), math.log10(y / b)) < 0.15 for a, b in spot)
        axes.annotate(label, (x, y), xytext=(5 + 12 * near, 3), textcoords="offset points", fontsize=8)
        spot.append((x, y))
    logarithmic(axes, "FLOPs per byte", "TFLOP/s")
    known = "the line: this machine's limits" if flops and bandwidth else "unknown peak, so no line"
    return Figure(f"Roofline at the largest cases; numbers as in the table, {known}", plots.svg(figure))
