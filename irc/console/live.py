"""How far a loop is: a live bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from irc.console.layout import cell_text
from irc.console.output import messages, note

LOG_INTERVAL = 10.0
"""Least seconds between two lines of a running loop where stderr is no terminal."""

_ROOM_FOR_BAR = 90


class ProgressBar(Protocol):
    """What `progress` hands to the loop."""

    def update(self, step: int, **figures: float | str) -> None:
        """Show that `step` steps are done, and the newest figures (`loss=2.3, tokens_per_s=1200`)."""


@contextmanager
def progress(description: str, total: int) -> Iterator[ProgressBar]:
    """Show how far a loop is, on stderr.

    A terminal gets a live bar with the newest figures and the time left (in a narrow one the bar is
    left out); anything else one plain line at most every 10 s and one when the loop ends well.

    Args:
        description: What is running.
        total: Steps in all.
    """
    console = messages()
    if not console.is_terminal or console.is_dumb_terminal:
        lines = _LineProgress(description, total)
        yield lines
        lines.close()
        return
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
    if console.width >= _ROOM_FOR_BAR:
        columns.append(BarColumn(bar_width=20))
    columns += [MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}", markup=False)]
    with Progress(*columns, console=console) as live:
        yield _LiveProgress(live, description, total)


class _LiveProgress:
    """A rich bar with one task."""

    def __init__(self, live: Progress, description: str, total: int) -> None:
        self._live = live
        self._task = live.add_task(description, total=total, figures="")

    def update(self, step: int, **figures: float | str) -> None:
        self._live.update(self._task, completed=step, figures="  ".join(_figures(figures)))


class _LineProgress:
    """Plain lines for files and pipes."""

    def __init__(self, description: str, total: int) -> None:
        self._description = description
        self._total = total
        self._start = self._last = time.monotonic()
        self._step = 0
        self._figures: list[str] = []

    def update(self, step: int, **figures: float | str) -> None:
        self._step, self._figures = step, _figures(figures)
        now = time.monotonic()
        if now - self._last >= LOG_INTERVAL:
            self._last = now
            left = (now - self._start) / max(step, 1) * max(self._total - step, 0)
            self._line(f"{duration(left)} left" if step else "")

    def close(self) -> None:
        self._line(f"{duration(time.monotonic() - self._start)} in all")

    def _line(self, end: str) -> None:
        note("  ".join([f"{self._description} {self._step}/{self._total}", *self._figures, end]).rstrip())


def _figures(figures: Mapping[str, float | str]) -> list[str]:
    """Format figures: `tokens_per_s=1234.0` becomes `tokens/s 1,234`."""
    return [f"{name.replace('_per_', '/').replace('_', ' ')} {cell_text(value)}" for name, value in figures.items()]


def duration(seconds: float) -> str:
    """Return seconds in words, such as `4 min 07 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
