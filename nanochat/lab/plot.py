"""Plots as SVG files that can be read on light and on dark: effects with intervals in one picture, and curves.

`forest` and `curves` are all there is; both take (value, low, high).
"""

import html
import math
from collections.abc import Mapping, Sequence

from nanochat.lab.estimate import Interval
from nanochat.render import Figure, standing_alone

COLOURS = ("#4a7fe5", "#d9722e", "#259386", "#b05cc6", "#8a8f98", "#b8962e", "#c4547a")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, ROW = 700, 360, 60, 36, 30, 42, 20
MARKED = 12
Point = tuple[float, float, float, float]  # x, y, low, high


def forest(title: str, rows: Sequence[tuple[str, Interval]], zero: float = 0.0) -> str:
    """A mark and an interval a row, sorted as given; a line at `zero`, where there is no effect."""
    bounded = lambda one: [v if math.isfinite(v) else one[0] for v in one]
    shown = [(label, bounded(one)) for label, one in rows]
    ends = [value for _, one in shown for value in one] + [zero]
    low, high = min(ends), max(ends)
    left = 20 + 7.2 * max(len(label) for label, _ in rows)
    across = lambda v: left + (v - low) / (high - low or 1) * (WIDTH - left - RIGHT - 10)
    bottom = TOP + ROW * len(rows)
    parts = [
        _text(12, 16, title),
        _line(across(zero), across(zero), TOP, bottom, 'opacity="0.5" stroke-dasharray="3 3"'),
    ]
    for value in _ticks(low, high):
        parts += [_line(across(value), across(value), TOP, bottom, 'opacity="0.15"')]
        parts += [_text(across(value), bottom + 18, f"{value:g}", "middle")]
    for i, (label, (value, begin, end)) in enumerate(shown):
        y = TOP + ROW * (i + 0.5)
        parts.append(_text(left - 10, y + 4, label, "end"))
        bar = f'x1="{across(begin):.1f}" x2="{across(end):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line {bar} stroke="{COLOURS[0]}" stroke-width="2"/>')
        parts.append(f'<circle cx="{across(value):.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[0]}"/>')
    return _whole(title, bottom + 28, parts)


def curves(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[Point]],
    log_x: bool = True,
    log_y: bool = False,
) -> str:
    """Lines through points with intervals, a colour and a legend's entry each. A line of more than MARKED points is a
    function, not measurements: it has no marks.
    """
    points = [point for line in series.values() for point in line]
    bounded = lambda v, y: v if math.isfinite(v) else y
    ys = [bounded(v, y) for _, y, low, high in points for v in (y, low, high)]
    to_x, to_y = (math.log if log else float for log in (log_x, log_y))
    x0, x1 = min(to_x(p[0]) for p in points), max(to_x(p[0]) for p in points)
    y0, y1 = min(map(to_y, ys)), max(map(to_y, ys))
    across = lambda v: LEFT + (to_x(v) - x0) / (x1 - x0 or 1) * (WIDTH - LEFT - RIGHT)
    up = lambda v: HEIGHT - BOTTOM - (to_y(v) - y0) / (y1 - y0 or 1) * (HEIGHT - BOTTOM - TOP - 24)
    parts = [_text(12, 16, f"{title}: {y_label}"), _text(WIDTH - RIGHT, HEIGHT - 6, x_label, "end")]
    for value in _ticks(min(ys), max(ys)):
        if not log_y or value > 0:
            parts.append(_line(LEFT, WIDTH - RIGHT, up(value), up(value), 'opacity="0.15"'))
            parts.append(_text(LEFT - 6, up(value) + 4, short(value), "end"))
    marked = [line for line in series.values() if len(line) <= MARKED] or list(series.values())
    there = sorted({p[0] for line in marked for p in line}) if log_x else _ticks(x0, x1)
    free = 0.0  # where the next label has room
    for value in there:
        if across(value) >= free:
            parts.append(_text(across(value), HEIGHT - BOTTOM + 18, short(value), "middle"))
            free = across(value) + 60
    at = float(LEFT)
    for i, (name, line) in enumerate(series.items()):
        colour, dash = COLOURS[i % len(COLOURS)], f'stroke-dasharray="{6 - i} {i}"' if 0 < i < 5 else ""
        ends = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y, _, _ in sorted(line))
        parts.append(f'<polyline points="{ends}" fill="none" stroke="{colour}" stroke-width="1.5" {dash}/>')
        for x, y, low, high in line if line in marked else ():
            parts.append(
                f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{up(bounded(low, y)):.1f}" '
                f'y2="{up(bounded(high, y)):.1f}" stroke="{colour}" stroke-width="2"/>'
                f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5" fill="{colour}"/>'
            )
        parts.append(
            f'<circle cx="{at + 4:.1f}" cy="{TOP + 4}" r="4" fill="{colour}"/>' + _text(at + 12, TOP + 8, name)
        )
        at += 30 + 7.2 * len(name)
    return _whole(title, HEIGHT, parts)


def short(value: float) -> str:
    """As a person would write it: 6,144 and 262,144, then 1.05 M and 5.64 G."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _ticks(low: float, high: float) -> list[float]:
    """Some five round values between."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next((m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6), 10)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _line(x1: float, x2: float, y1: float, y2: float, more: str) -> str:
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="currentColor" {more}/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _whole(title: str, height: float, parts: list[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(title)}"'
    return standing_alone(Figure(title, f"<svg {box}>{''.join(parts)}</svg>")) + "\n"
