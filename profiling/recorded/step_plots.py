"""The plots of a lab page: where a step goes, time by category and phase, the roofline, the card's sensors."""

from collections.abc import Sequence
from typing import Any

from nanochat.render import Figure
from profiling.plots import WIDTH, drawn, new_figure, svg
from profiling.recorded import costs

# Of middle lightness, so that they can be told from a white page and from a black one.
COLOURS = {
    costs.PRODUCTS: "#3b82f6",
    costs.ATTENTION: "#8b5cf6",
    costs.STREAMING: "#10a37f",
    costs.LOSS: "#d97706",
    costs.OPTIMIZER: "#db2777",
    costs.OTHER: "#64748b",
    costs.COMMUNICATION: "#dc2626",
    costs.COPIES: "#0891b2",
    "idle": "#9ca3af",
}


@drawn
def waterfall(bars: Sequence[tuple[str, float, str]]) -> Figure:
    """(label, ms, category): each bar begins where the one above ends; the last ends at the step time."""
    figure, axes = new_figure(WIDTH, 0.8 + 0.26 * len(bars))
    at = 0.0
    whole = sum(ms for _, ms, _ in bars)
    for row, (_, ms, category) in enumerate(bars):
        axes.barh(row, ms, left=at, color=COLOURS[category], height=0.7)
        axes.text(max(at, at + ms) + 0.01 * whole, row, f"{ms:,.2f}", va="center")
        at += ms
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14 * whole)
    axes.set_xlabel("ms of a step")
    return Figure("Where a step goes: the bars add up to its time", svg(figure))


@drawn
def by_phase(table: dict[str, dict[str, float]]) -> Figure:
    """phase → category → ms."""
    figure, axes = new_figure(WIDTH, 1.4 + 0.26 * len(table))
    left = [0.0] * len(table)
    for category in costs.CATEGORIES:
        widths = [row.get(category, 0.0) for row in table.values()]
        if any(widths):
            axes.barh(range(len(table)), widths, left=left, color=COLOURS[category], label=category, height=0.7)
            left = [a + b for a, b in zip(left, widths)]
    axes.set_yticks(range(len(table)), list(table))
    axes.invert_yaxis()
    axes.set_xlabel("ms of a step")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return Figure("Time by phase and category", svg(figure))


@drawn
def roofline(points: Sequence[tuple[str, str, float, float]], peaks: Sequence[float], bandwidth: float) -> Figure:
    """(name, category, FLOPs a byte, FLOP/s) of kernels, a roof for each peak (FLOP/s); bandwidth in bytes/s."""
    figure, axes = new_figure(WIDTH, 3.6)
    for category in dict.fromkeys(category for _, category, _, _ in points):
        chosen = [(x, y / 1e12) for _, of, x, y in points if of == category]
        axes.scatter(*zip(*chosen), s=30, alpha=0.85, color=COLOURS[category], label=category)
    xs, ys = [x for _, _, x, _ in points], [y / 1e12 for _, _, _, y in points]
    for peak in peaks:
        ridge = peak / bandwidth
        xs, ys = [*xs, ridge], [*ys, peak / 1e12]
        ends = [min(xs) / 3, ridge, max(xs) * 3]
        axes.plot(ends, [min(peak, x * bandwidth) / 1e12 for x in ends], color="#000000", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(xs) / 3, max(xs) * 3)
    axes.set_ylim(min(ys) / 3, max(ys) * 3)
    axes.set_xlabel("FLOPs per byte that must be moved")
    axes.set_ylabel("TFLOP/s")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return Figure("Roofline: kernels under the card's roof", svg(figure))


SENSORS = (("sm_clock_mhz", "SM clock, MHz"), ("power_w", "power, W"), ("temperature_c", "temperature, °C"))


def sensors(rows: Sequence[dict[str, Any]]) -> list[Figure | str]:
    """One plot a sensor that was read."""
    read = [(label, [(row["t"], row[key]) for row in rows if row.get(key) is not None]) for key, label in SENSORS]
    return [sensor(label, points) for label, points in read if points]


@drawn
def sensor(label: str, points: Sequence[tuple[float, float]]) -> Figure:
    figure, axes = new_figure(WIDTH, 2.0)
    axes.plot(*zip(*points), color="#3b82f6")
    axes.set_xlabel("seconds")
    axes.set_ylabel(label)
    return Figure(f"{label}, while recording", svg(figure))
