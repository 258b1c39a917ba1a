"""The static report as a page: rooflines, registers and occupancy, predicted times, and every kernel's machine code."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from nanochat.render import Figure, Section, Table
from profiling.plots import WIDTH, new_figure, svg
from profiling.predicted.cards import Card
from profiling.predicted.predict import PRODUCTS, Prediction

# One colour a target, of middle lightness: to be told from a white page and from a black one.
COLOURS = {
    "sm_80": "#8b5cf6", "sm_86": "#a3a3a3", "sm_89": "#64748b", "sm_90": "#10a37f", "sm_100": "#3b82f6",
    "sm_120": "#d97706", "gfx942": "#db2777",
}  # fmt: skip


def sections(report: dict[str, Any], cards: dict[str, Card], calls: dict[tuple[str, str, str], Prediction]) -> list:
    """calls: (op, shape, target) → the prediction of its forward."""
    rows = [row for row in report["rows"] if row["whose"] == "ours"]
    peers = [row for row in report["rows"] if row["whose"] != "ours"]
    made = [summary(report, cards, rows), predicted_times(report, cards, calls), rooflines(report, cards, calls)]
    made.append(Section("Registers and occupancy", [registers(rows)]))
    made += [kernels(target, [row for row in rows if row["target"] == target]) for target in cards]
    return made + ([side_by_side(rows, peers)] if peers else [])


def summary(report: dict[str, Any], cards: dict[str, Card], rows: Sequence[dict[str, Any]]) -> Section:
    compiled = [row for row in rows if not row["error"]]
    wrong = [row for row in rows if row["faults"]]
    counts = [
        ("compiled", f"{len(compiled)} of {len(rows)} launches"),
        ("spilling", f"{sum(row['spill_bytes'] > 0 for row in compiled)}"),
        ("with float64 instructions", f"{sum(row['float64_instructions'] > 0 for row in compiled)}"),
        ("with tensor-core instructions", f"{sum(bool(row['tensor_core']) for row in compiled)}"),
        ("breaking a promise", f"{len(wrong)}"),
    ]
    names = ", ".join(f"{target} as {chip.name} ({chip.constants})" for target, chip in cards.items())
    blocks: list[Any] = [
        f"Every kernel at shapes of {' and '.join(report['shapes'])} in {report['dtype']}, compiled ahead of time by "
        f"Triton {report['triton']} and read as machine code. No card was involved. Times are predicted for {names}; "
        "nothing on this page was measured.",
        Table(("launches", ""), counts),
    ]
    if wrong:
        faults = [(row["op"], row["kernel"], row["target"], row["shape"], "; ".join(row["faults"])) for row in wrong]
        blocks.append(Table(("op", "kernel", "target", "case", "what is wrong"), faults))
    return Section("Summary", blocks)


def predicted_times(
    report: dict[str, Any], cards: dict[str, Card], calls: dict[tuple[str, str, str], Prediction]
) -> Section:
    """Of one call of each op's forward, on each card."""
    rows = []
    for call in report["calls"]:
        said = [calls.get((call["op"], call["shape"], target)) for target in cards]
        facts = (f"{call['bytes'] / 1e6:,.1f}", f"{call['asked']:.2f}" if call["asked"] else "–")
        rows.append(
            (
                call["op"],
                call["shape"],
                *facts,
                f"{call['flops'] / 1e9:,.1f}",
                *(one.cell() if one else "–" for one in said),
            )
        )
    head = ("op", "case", "least MB", "asked / least", "GFLOP", *(chip.name for chip in cards.values()))
    text = (
        "Of one call of the forward. Least: bytes that must go to and from memory, inputs and results once. Asked: "
        "what the kernels ask for, counted in Triton's interpreter at a small case (kernels/README.md), before any "
        "cache; products ask for a tile as often as they need it. A kernel that loops has a lower bound only: its "
        "machine code does not say how often."
    )
    return Section("Predicted times", [text, times(report, cards, calls), Table(head, rows)])


def times(report: dict[str, Any], cards: dict[str, Card], calls: dict[tuple[str, str, str], Prediction]) -> Figure:
    """A row per op at its last case; a mark per card with its band, an arrow where only a lower bound is known."""
    shown = {call["op"]: call["shape"] for call in report["calls"]}
    figure, axes = new_figure(WIDTH, 1.2 + 0.3 * len(shown))
    for nth, (target, chip) in enumerate(cards.items()):
        for row, (op, shape) in enumerate(shown.items()):
            if said := calls.get((op, shape, target)):
                y = row + 0.14 * (nth - (len(cards) - 1) / 2)
                micro = 1e6 * said.seconds
                if said.lower_bound:
                    axes.plot([micro], [y], ">", color=COLOURS[target], markersize=5)
                else:
                    axes.plot([1e6 * said.low, 1e6 * said.high], [y, y], color=COLOURS[target], linewidth=1.5)
                    axes.plot([micro], [y], "o", color=COLOURS[target], markersize=4)
        axes.plot([], [], "o", color=COLOURS[target], label=chip.name)
    axes.set_xscale("log")
    axes.set_xlabel("predicted µs of one forward; ▸: at least")
    axes.set_yticks(range(len(shown)), [f"{op}" for op in shown])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return Figure("Predicted time of each op's forward, with its band", svg(figure))


def rooflines(report: dict[str, Any], cards: dict[str, Card], calls: dict[tuple[str, str, str], Prediction]) -> Section:
    flops = {(call["op"], call["shape"]): (call["flops"], call["bytes"]) for call in report["calls"]}
    last = {call["op"]: call["shape"] for call in report["calls"]}
    blocks: list[Any] = [
        "FLOPs of a forward over its least bytes, and the FLOP/s that the predicted time means: a dot on the sloped "
        "line is as fast as memory allows, one on the flat line as the tensor cores do."
    ]
    for target, chip in cards.items():
        dots = []
        for op, shape in last.items():
            if said := calls.get((op, shape, target)):
                work, moved = flops[op, shape]
                dots.append((op, work / moved, work / said.seconds))
        if dots:
            blocks.append(roofline(chip, target, dots))
    return Section("Rooflines, predicted", blocks)


def roofline(chip: Card, target: str, dots: Sequence[tuple[str, float, float]]) -> Figure:
    """dots: (op, FLOPs a byte, FLOP/s)."""
    figure, axes = new_figure(WIDTH, 4.6)
    xs, ys = [x for _, x, _ in dots], [y / 1e12 for _, _, y in dots]
    left, right = min(xs) / 2, max(max(xs) * 5, 4 * chip.bf16 / chip.memory)
    for peak, name in ((chip.bf16, "bf16"), (chip.fp8, "fp8")):
        if peak and (name == "bf16" or any(op.startswith("fp8_") for op, _, _ in dots)):
            ends = [left, peak / chip.memory, right]
            axes.plot(ends, [min(peak, x * chip.memory) / 1e12 for x in ends], color="#000000", linewidth=1)
            axes.text(right, peak / 1e12, f"{name} ", ha="right", va="bottom")
    axes.scatter(xs, ys, s=22, color=COLOURS[target], zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(min(ys) / 2, 20 * max(chip.bf16, chip.fp8) / 1e12)
    axes.set_xlabel("FLOPs per byte that must be moved")
    axes.set_ylabel("predicted TFLOP/s")
    label(axes, [(op, x, y) for (op, x, _), y in zip(dots, ys)])
    return Figure(f"{chip.name}: predicted speed of each op's forward under the card's roof", svg(figure))


def label(axes: Any, dots: Sequence[tuple[str, float, float]]) -> None:
    """Names of the dots: of streaming ops in a column beside the slope, of products aslant at their dots."""
    at: dict[tuple[float, float], list[str]] = {}  # dots that cannot be told apart share a label
    for name, x, y in dots:
        at.setdefault((round(math.log10(x), 1), round(math.log10(y), 1)), []).append(name)
    first = {name: ", ".join(names) for names in at.values() for name in names[:1]}
    named = sorted(((y, x, first[name]) for name, x, y in dots if name in first), reverse=True)
    column = [(x, y, text) for y, x, text in named if x < PRODUCTS]
    for row, (x, y, text) in enumerate(column):
        axes.annotate(text, (x, y), xytext=(0.36, 0.40 - 0.048 * row), textcoords="axes fraction", va="center",
                      fontsize=8, arrowprops=dict(arrowstyle="-", linewidth=0.4, relpos=(0, 0.5)))  # fmt: skip
    for y, x, text in named:
        if x >= PRODUCTS:
            up = text.startswith("fp8_")  # the roof of fp8 leaves room above the dots
            axes.annotate(text, (x, y), xytext=(3, 4 if up else -4), textcoords="offset points", fontsize=8,
                          rotation=50 if up else -60, rotation_mode="anchor", va="center")  # fmt: skip


def registers(rows: Sequence[dict[str, Any]]) -> Figure:
    """Two columns of dots, a row per kernel: registers of a thread, and warps resident of the most there can be."""
    shown = [row for row in rows if not row["error"]]
    names = list(dict.fromkeys(row["kernel"] for row in shown))
    figure, axes = new_figure(WIDTH, 1.2 + 0.24 * len(names))
    beside = axes.inset_axes([0.55, 0, 0.45, 1])
    axes.set_axis_off()
    first = axes.inset_axes([0, 0, 0.5, 1])
    for target in dict.fromkeys(row["target"] for row in shown):
        mine = [row for row in shown if row["target"] == target]
        ys = [names.index(row["kernel"]) for row in mine]
        look = dict(s=14, color=COLOURS[target], alpha=0.8, zorder=3)
        first.scatter([row["registers"] for row in mine], ys, label=target, **look)
        beside.scatter([100 * row["occupancy"] for row in mine], ys, **look)
    for one, text in ((first, "registers of a thread"), (beside, "occupancy, %")):
        one.set_yticks(range(len(names)), names if one is first else [""] * len(names))
        one.set_ylim(len(names) - 0.5, -0.5)
        one.set_xlabel(text)
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return Figure("Registers and occupancy of every kernel, by target", svg(figure))


HEAD = ("registers", "spilled B", "stack B", "shared B", "occupancy", "access", "tensor core", "float64")
CLASSES = ("MUFU", "SHFL", "BAR", "atomic", "FP32 fma", "FP32 add", "FP32 mul", "convert", "integer", "other")


def kernels(target: str, rows: Sequence[dict[str, Any]]) -> Section:
    """Two tables of a target's kernels: resources, and instructions by class as they stand in the code."""
    blocks: list[Any] = [Table(("kernel", "op", "pass", "case", *HEAD), merged(rows, resources))]
    reasons = dict.fromkeys(f"{row['kernel']}: {row['spill_reason']}." for row in rows if row["spill_reason"])
    if reasons:
        blocks.append(f"Spills that are accepted. {' '.join(reasons)}")
    compiled = [row for row in rows if not row["error"]]
    head = (
        "instructions of",
        "op",
        "pass",
        "case",
        "loops",
        "global memory",
        "shared memory",
        "TMA, products",
        *CLASSES,
    )
    blocks.append(Table(head, merged(compiled, instructions)))
    return Section(f"Machine code: {target}", blocks)


def merged(rows: Sequence[dict[str, Any]], cells: Callable[[dict[str, Any]], tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Lines of a table; passes and cases with the same numbers share one."""
    found: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for row in rows:
        ways, cases = found.setdefault((row["kernel"], row["op"], *cells(row)), ([], []))
        ways.append(row["way"])
        cases.append(row["shape"])
    join = lambda words: ", ".join(dict.fromkeys(words))
    return [(*line[:2], join(ways), join(cases), *line[2:]) for line, (ways, cases) in found.items()]


def resources(row: dict[str, Any]) -> tuple[str, ...]:
    if row["error"]:
        return (row["error"], *[""] * (len(HEAD) - 1))
    return (
        f"{row['registers']}", f"{row['spill_bytes']}", f"{row['stack_bytes']}", f"{row['shared_bytes']:,}",
        f"{row['occupancy']:.0%}", f"{row['access_bytes']} B", row["tensor_core"] or "–",
        f"{row['float64_instructions']}",
    )  # fmt: skip


def instructions(row: dict[str, Any]) -> tuple[str, ...]:
    mix = dict(row["mix"])
    numbers = [f"{mix.pop(name, 0)}" for name in CLASSES]
    shared = {name: mix.pop(name) for name in list(mix) if re.match(r"LDS|STS|ds_", name)}
    memory = {name: mix.pop(name) for name in list(mix) if "." in name}
    listed = lambda part: ", ".join(f"{name} {count}" for name, count in part.items()).replace(" ", "\u00a0") or "–"
    return "yes" if row["looped"] else "–", listed(memory), listed(shared), listed(mix), *numbers


def side_by_side(rows: Sequence[dict[str, Any]], peers: Sequence[dict[str, Any]]) -> Section:
    """Liger-Kernel's kernels, compiled and read the same way, under ours of the same op and target."""
    asked = {(row["op"], row["target"]) for row in peers}
    both = [row for row in rows if (row["op"], row["target"]) in asked and row["shape"] == "d24"] + list(peers)
    both.sort(key=lambda row: (row["op"], row["target"], row["whose"] != "ours"))
    lines = [(row["op"], row["target"], row["whose"], row["kernel"], *resources(row)) for row in both]
    head = ("op", "target", "whose", "kernel", *HEAD)
    return Section("Beside Liger-Kernel", ["Not a speed. Both sides are compiled and read alike.", Table(head, lines)])
