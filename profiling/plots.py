"""Plots for the lab's pages: matplotlib figures as <svg> elements that a page can hold, in the page's own colours."""

import io
from collections.abc import Callable
from functools import wraps
from typing import Any

from nanochat import optional
from nanochat.errors import UserError
from nanochat.render import Figure

WIDTH = 5.5  # inches: letters can still be read when a phone shows it 343 pixels wide
NOT_DRAWN = "(A plot is missing here: matplotlib is not installed; pip install '.[lab]'.)"


def drawn(plot: Callable[..., Figure]) -> Callable[..., Figure | str]:
    """The function as it is, but without matplotlib it gives a sentence for the page, whose tables say as much."""

    @wraps(plot)
    def made(*args: Any) -> Figure | str:
        try:
            optional.package("matplotlib", "rcParams")
        except ImportError:
            return NOT_DRAWN
        return plot(*args)

    return made


def new_figure(width: float = 8.0, height: float = 4.0) -> tuple[Any, Any]:
    """(figure, axes), inches; black is drawn in the page's text colour. Raises UserError without matplotlib."""
    try:
        matplotlib = optional.package("matplotlib", "rcParams")
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install '.[lab]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lab", "font.size": 9})
    from matplotlib import figure as drawing

    figure = drawing.Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: Any) -> str:
    """The figure as one <svg> element on a transparent ground, without a date: the same figure, the same text."""
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    # Black means the text's colour, so that the plot can be read on a dark page too.
    return text[text.index("<svg") :].replace("#000000", "currentColor")
