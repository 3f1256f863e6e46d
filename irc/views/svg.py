"""Draws plots as SVG text with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from irc.errors import InputError

# The palette of Okabe and Ito, which color-blind readers can tell apart.
BLUE, SKY, GREEN, ORANGE, RED, PINK, GREY, BLACK = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#888888",
    "#000000",
)
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "irc",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def svg(draw: Callable[[Any], None], width: float = 6.4, height: float = 3.6) -> str:
    """Return a plot as SVG text.

    Args:
        draw: Draws the plot on the axes that it is given.
        width: Width of the figure in inches.
        height: Height of the figure in inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "plots need matplotlib; install it with: pip install 'informed-routing-compiler[report]'"
        ) from error
    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def legend(axes: Any) -> None:
    """Put a legend above the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    entry_inches = 0.7 + 0.085 * max(map(len, labels), default=0)  # width of the longest label and its line
    columns = max(1, min(len(labels), int(axes.figure.get_figwidth() / entry_inches)))
    axes.figure.legend(handles, labels, frameon=False, loc="outside upper left", ncols=columns)
