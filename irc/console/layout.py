"""Tables, trees and small bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from irc.console.output import results, say
from irc.console.styled import Styled


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Show a table on stdout; columns of numbers are right-aligned.

    Args:
        title: The heading, or an empty string.
        columns: Headings of the columns.
        rows: One value per column. None is shown as a dash, floats have four digits.

    Raises:
        ValueError: A row has more or fewer cells than there are columns.
    """
    values = [list(row) for row in rows]
    if any(len(row) != len(columns) for row in values):
        raise ValueError(f"table {title!r}: every row needs {len(columns)} cells, one per column of {list(columns)}")
    grid = Table(box=None, pad_edge=False, show_header=any(columns), header_style="dim", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        cells = [row[index] for row in values]
        numeric = bool(cells) and all(cell is None or isinstance(cell, int | float) for cell in cells)
        grid.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in values:
        grid.add_row(*(_label(cell) for cell in row))
    if title:
        say(title, style="bold")
    results().print(grid)


def _label(value: object) -> Text:
    return Text(cell_text(value), style=value.style if isinstance(value, Styled) else "")


def cell_text(value: object) -> str:
    """Format a value: `-` for None, yes or no, thousands separators, floats with four digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def tree(title: str, content: Mapping[Any, object] | Sequence[object]) -> None:
    """Show a nested structure on stdout.

    Args:
        title: The root's label.
        content: The keys of a mapping become branches, or `key: value` if the value is a leaf, or the bare key if it is
            None. The items of a sequence become leaves or branches.
    """
    root = Tree(Text(title, style="bold"), guide_style="dim")
    _grow(root, content)
    results().print(root)


def _grow(branch: Tree, content: object) -> None:
    if isinstance(content, Mapping):
        for key, value in content.items():
            if value is None:
                branch.add(_label(key))
            elif isinstance(value, Mapping | list | tuple):
                _grow(branch.add(_label(key)), value)
            else:
                branch.add(Text(f"{key}: {cell_text(value)}"))
    elif isinstance(content, list | tuple):
        for item in content:
            _grow(branch, item)
    else:
        branch.add(_label(content))


def bar(fraction: float, width: int = 20) -> str:
    """Draw a fraction from 0 to 1 as a bar, in ASCII if stdout cannot encode blocks.

    Values outside of the range are clipped, and NaN is drawn empty. Only 0 is empty and only 1 is full.

    Args:
        fraction: The value to draw.
        width: Total number of characters, at least two.
    """
    full, empty = ("#", ".") if results().options.ascii_only else ("█", "░")
    filled = 0
    if fraction > 0:
        filled = width if fraction >= 1 else min(max(round(fraction * width), 1), width - 1)
    return full * filled + empty * (width - filled)
