"""A picture of scores with their intervals: a band for each task, in it a mark and a bar for each stage of the model,
and for each other model beside it.

An <svg> element for render.Figure, which needs no script and takes the page's text colour; stages differ by shape too.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = dict(base="#d9722e", mid="#259386", sft="#4a7fe5", rl="#b05cc6")
OTHERS = ("#8a8f98", "#b8962e", "#c4547a")  # models that are no stage, in turns
ROW, WIDTH, MARGIN, LETTER = 14, 760, 24, 7.2  # pixels; LETTER of a label's text


@dataclass(frozen=True)
class Band:
    """Of one task. scores: by stage or another model's name, (score, low, high), shares of 1. chance: what guessing
    scores, a thin line.
    """

    label: str
    scores: Mapping[str, tuple[float, float, float]]
    chance: float = 0.0


def picture(title: str, bands: Sequence[Band]) -> str:
    """The <svg> element. Scores from 0, or the lowest there is, to 100%."""
    there = dict.fromkeys(stage for band in bands for stage in band.scores)
    others = [name for name in there if name not in COLOURS]
    colours = {stage: colour for stage, colour in COLOURS.items() if stage in there}
    colours |= {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    left = 12 + LETTER * max((len(band.label) for band in bands), default=0)
    lowest = min([0.0, *(low for band in bands for _, low, _ in band.scores.values())])
    across = lambda value: left + (value - lowest) / (1 - lowest) * (WIDTH - left - MARGIN)
    parts, at, y = [], left, 10.0
    for stage, colour in colours.items():
        shown = stage.upper() if stage in COLOURS else stage
        wide = max(70, 30 + LETTER * len(shown))
        if at > left and at + wide > WIDTH:
            at, y = left, y + ROW + 4
        text = f'<text x="{at + 9:.0f}" y="{y + 4:.0f}">{html.escape(shown)}</text>'
        parts.append(_mark(stage, colour, at, y) + text)
        at += wide
    y = top = y + 20
    for band in bands:
        height = ROW * max(1, len(band.scores)) + 6
        middle = y + height / 2
        parts.append(
            f'<text x="{left - 8:.1f}" y="{middle + 4:.1f}" text-anchor="end">{html.escape(band.label)}</text>'
        )
        if band.chance:
            parts.append(_line(across(band.chance), across(band.chance), y, y + height, 'stroke-dasharray="2 2"'))
        for i, stage in enumerate(stage for stage in colours if stage in band.scores):
            score, low, high = band.scores[stage]
            line = y + 3 + ROW * (i + 0.5)
            words = f"{band.label}, {stage}: {score:.1%} ({low:.1%} to {high:.1%})"
            bar = f'stroke="{colours[stage]}" stroke-width="2"'
            parts.append(
                f"<g><title>{html.escape(words)}</title>"
                f'<line x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{line:.1f}" y2="{line:.1f}" {bar}/>'
                f"{_mark(stage, colours[stage], across(score), line)}</g>"
            )
        y += height
        parts.append(_line(left, WIDTH - MARGIN, y, y, 'opacity="0.15"'))
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(across(value), across(value), top, y, 'opacity="0.25"'))
        parts.append(f'<text x="{across(value):.1f}" y="{y + 15:.1f}" text-anchor="middle">{value:.0%}</text>')
    box = f'viewBox="0 0 {WIDTH} {y + 22:.0f}" width="{WIDTH}"'
    return f'<svg {box} role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'


def _line(x1: float, x2: float, y1: float, y2: float, more: str) -> str:
    ends = f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" {more}/>'


def _mark(stage: str, colour: str, x: float, y: float) -> str:
    """Base a ring, mid a square, SFT a disc, RL a diamond, another model a triangle."""
    if stage == "base":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="none" stroke="{colour}" stroke-width="2"/>'
    if stage == "mid":
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="{colour}"/>'
    if stage == "sft":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    corners = ((0, -5), (5, 0), (0, 5), (-5, 0)) if stage == "rl" else ((0, -5), (4.5, 4), (-4.5, 4))
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}"/>'
