"""A report's content, and the two forms it is written in: Markdown, and one HTML page that needs nothing else.

The page follows the reader's dark or light setting, scrolls wide tables inside themselves on a phone, has no script. A
long name in a table breaks anywhere, so that the numbers beside it are seen.
Everything shown is escaped: a model's answer is not trusted.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Link:
    """Text in a table's cell that leads somewhere."""

    text: str
    target: str


Cell = str | Link


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head."""

    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Curve:
    """A line through (x, y) points."""

    title: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    """A plot drawn elsewhere, as an <svg> element (dots.py, profiling/plots.py): trusted, not escaped.

    file: the name of the file beside a Markdown report that has it (`standing_alone`); "" where there is none.
    """

    title: str
    svg: str
    file: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and its blocks: Table, Curve, Figure, or text."""

    title: str
    blocks: Sequence[Any]


# ---- Markdown


def markdown(title: str, sections: list[Section], links: bool = True) -> str:
    """links: whether to write targets of links and pictures; without, it is for a terminal."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [_markdown_block(block, links) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_block(block: Table | Curve | Figure | str, links: bool) -> str:
    if isinstance(block, Figure):
        return f"![{block.title}]({block.file})" if block.file and links else f"(plot: {block.title})"
    if isinstance(block, Curve):
        return f"{block.title}: {', '.join(f'{x:g}: {y:.3f}' for x, y in thinned(block.points, 8))}"
    if isinstance(block, str):
        return "\n".join(f"> {line}  " for line in block.split("\n")) if "\n" in block else block

    def shown(cell: Cell) -> str:
        text = cell if isinstance(cell, str) else cell.text
        text = text.replace("|", "\\|").replace("\n", " / ")
        return f"[{text}]({cell.target})" if isinstance(cell, Link) and links else text

    def line(cells: Sequence[Cell]) -> str:
        return "| " + " | ".join(map(shown, cells)) + " |"

    return "\n".join([line(block.head), "|" + "---|" * len(block.head), *(line(row) for row in block.rows)])


def thinned(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """About so many of the points, the first and the last among them."""
    step = max(1, (len(points) - 1) // (count - 1)) if count > 1 else 1
    chosen = list(points[::step])
    return chosen if chosen[-1] == points[-1] else [*chosen, points[-1]]


# ---- HTML

STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #2563eb; --soft: #8881; }
@media (prefers-color-scheme: dark) { :root { --accent: #7aa7ff; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); }
th { background: var(--soft); } td { white-space: pre-line; }
@media (max-width: 40rem) { th, td { padding: 0.3rem 0.4rem; } }
td.long { overflow-wrap: anywhere; min-width: 6rem; max-width: 30rem; }
figure { margin: 1.5rem 0; max-width: 40rem; } figcaption { font-size: 0.9rem; }
a { color: inherit; text-decoration-color: var(--accent); }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
blockquote { margin: 1rem 0; padding: 0.5rem 1rem; border-left: 4px solid var(--accent); white-space: pre-line; }
"""


def page(title: str, sections: list[Section]) -> str:
    """The whole HTML document."""
    body = "".join(
        f"<section><h2>{html.escape(s.title)}</h2>{''.join(_html_block(block) for block in s.blocks)}</section>\n"
        for s in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{html.escape(title)}</h1>\n{body}</main></body></html>\n"
    )


def _html_block(block: Table | Curve | Figure | str) -> str:
    if isinstance(block, Curve | Figure):
        drawn = svg(block) if isinstance(block, Curve) else block.svg
        return f"<figure>{drawn}<figcaption>{html.escape(block.title)}</figcaption></figure>"
    if isinstance(block, str):
        tag = "blockquote" if "\n" in block else "p"
        return f"<{tag}>{html.escape(block)}</{tag}>"
    head = "".join(f'<th scope="col">{_html_text(cell)}</th>' for cell in block.head)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in block.rows)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{html.escape(_plain(block.head[0]) or "table")}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


LONG = 16  # letters of a word that leave too little of a phone to the columns beside it


def _plain(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell.text


def _html_text(cell: Cell) -> str:
    text = html.escape(_plain(cell))
    return f'<a href="{html.escape(cell.target)}">{text}</a>' if isinstance(cell, Link) else text


def _cell(cell: Cell) -> str:
    start = '<td class="long">' if max(map(len, _plain(cell).split()), default=0) > LONG else "<td>"
    return f"{start}{_html_text(cell)}</td>"


WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 640, 240, 48, 24, 10


def svg(curve: Curve) -> str:
    """The curve with its axes; y from a little below the least value, five lines across."""
    points = thinned(curve.points, 300)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    span = (high - low) or 1.0
    low -= 0.05 * span
    span = (high - low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - xs[0]) / ((xs[-1] - xs[0]) or 1.0) * (WIDTH - LEFT - MARGIN)
        return across, HEIGHT - BOTTOM - (y - low) / span * (HEIGHT - BOTTOM - MARGIN)

    parts = []
    for i in range(5):
        value = low + span * i / 4
        y = place(xs[0], value)[1]
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity="0.15"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for x, anchor in ((xs[0], "start"), (xs[-1], "end")):
        parts.append(f'<text x="{place(x, low)[0]:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{x:g}</text>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    parts.append(f'<polyline points="{path}" fill="none" stroke="var(--accent, #2563eb)" stroke-width="2"/>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(curve.title)}">{"".join(parts)}</svg>'
    )


def standing_alone(figure: Figure) -> str:
    """A figure as a file of its own, readable on light and on dark."""
    style = "<style>svg{color:#333;font:12px system-ui,sans-serif}text{fill:currentColor}"
    style += "@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"
    begin, rest = figure.svg.split(">", 1)
    return f'{begin} xmlns="http://www.w3.org/2000/svg">{style}{rest}'
