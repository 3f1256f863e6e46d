"""Plots made of characters."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from irc.console.layout import cell_text
from irc.console.output import results, say

_HEIGHT, _WIDTH = 12, 56


def plot(title: str, x_label: str, y_label: str, points: Sequence[tuple[float, float, str]]) -> None:
    """Plot points on stdout, each marked by the first character of its label.

    Args:
        title: Heading.
        x_label: Shown below the plot.
        y_label: Shown above the plot.
        points: (x, y, label); a later point covers an earlier one at the same place.
    """
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for x, y, label in points:
        row = _HEIGHT - 1 - _place(y, ys, _HEIGHT)
        grid[row][_place(x, xs, _WIDTH)] = label[0]
    ticks = {0: cell_text(max(ys)), _HEIGHT - 1: cell_text(min(ys))}
    margin = max(len(tick) for tick in ticks.values())
    ascii_only = results().options.ascii_only
    wall, corner, floor = ("|", "+", "-") if ascii_only else ("│", "└", "─")
    lines = [y_label]
    lines += [f"{ticks.get(index, ''):>{margin}} {wall}{''.join(cells)}".rstrip() for index, cells in enumerate(grid)]
    low, high = cell_text(min(xs)), cell_text(max(xs))
    lines += [" " * margin + f" {corner}{floor * _WIDTH}"]
    lines += [
        " " * (margin + 2) + low + high.rjust(_WIDTH - len(low)),
        " " * (margin + 2) + x_label.center(_WIDTH).rstrip(),
    ]
    say(title, style="bold")
    results().print(Text("\n".join(lines)), no_wrap=True, overflow="ignore", crop=False)


def _place(value: float, values: Sequence[float], size: int) -> int:
    low, high = min(values), max(values)
    return round((value - low) / (high - low) * (size - 1)) if high > low else 0
