"""Progress of a loop: a live bar on a terminal, an occasional plain line anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from irc.console.layout import cell_text
from irc.console.output import messages, note
from irc.progress import place

LOG_INTERVAL = 10.0
"""Minimum seconds between two lines of a running loop if stderr is not a terminal."""

_ROOM_FOR_BAR = 100
_ROOM_FOR_TIME = 10


class ProgressBar(Protocol):
    """The object that `progress` gives to the loop."""

    def update(self, step: int, **figures: float | str) -> None:
        """Show that `step` steps are done, and the latest figures (`loss=2.3, tokens_per_s=1200`)."""


@contextmanager
def progress(description: str, total: int) -> Iterator[ProgressBar]:
    """Show the progress of a loop on stderr.

    A terminal gets a live bar with the latest figures and the remaining time. A narrow terminal loses the bar first,
    then figures from the end, then the time, but never the name and the count. Anything else gets a plain line at most
    every 10 s, and one when the loop ends without an error.

    Args:
        description: What is running.
        total: Number of steps.
    """
    console = messages()
    if not console.file.isatty() or console.is_dumb_terminal:  # FORCE_COLOR makes a log a terminal for rich
        lines = _LineProgress(description, total)
        with place(lines):
            yield lines
        lines.close()
        return
    live = Progress(*_columns(console, description, total), console=console)
    with _shown(live):
        bar = _LiveProgress(live, description, total)
        with place(bar):
            yield bar


@contextmanager
def _shown(live: Progress) -> Iterator[None]:
    """Show a live display and always restore the cursor, even if Ctrl-C interrupts its start, where rich does not."""
    try:
        live.start()
        yield
        live.stop()
    except BaseException:
        try:
            with suppress(IndexError):  # rich undoes steps that an interrupted start did not take
                live.stop()
        finally:
            live.console.show_cursor(True)
        raise


def _columns(console: Console, description: str, total: int) -> list[ProgressColumn]:
    """Return the columns that fit into this terminal; a name that is too long is wrapped."""
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False, table_column=Column())]
    if console.width >= _ROOM_FOR_BAR:
        columns.append(BarColumn(bar_width=20))
    columns.append(MofNCompleteColumn(table_column=Column(no_wrap=True)))
    if console.width >= len(f"{description} {total}/{total}") + _ROOM_FOR_TIME:
        columns.append(TimeRemainingColumn(table_column=Column(no_wrap=True)))
    return [*columns, _FiguresColumn(console, columns)]


class _FiguresColumn(ProgressColumn):
    """The latest figures, as many as fit beside the other columns."""

    def __init__(self, console: Console, others: Sequence[ProgressColumn]) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._console, self._others = console, others

    def render(self, task: Task) -> Text:
        """Show the figures that fit, starting with the first."""
        options = self._console.options
        taken = sum(Measurement.get(self._console, options, column(task)).maximum + 1 for column in self._others)
        shown = Text()
        for figure in task.fields["figures"]:
            longer = Text("  ").join([shown, Text(figure)]) if shown else Text(figure)
            if taken + longer.cell_len > options.max_width:
                break
            shown = longer
        return shown


class _Steps:
    """How far a loop is; its text is `router 12/300`."""

    def __init__(self, description: str, total: int) -> None:
        self._description = description
        self._total = total
        self._step = 0

    def __str__(self) -> str:
        return f"{self._description} {self._step}/{self._total}"


class _LiveProgress(_Steps):
    """A rich bar with one task."""

    def __init__(self, live: Progress, description: str, total: int) -> None:
        super().__init__(description, total)
        self._live = live
        self._task = live.add_task(description, total=total, figures=[])

    def update(self, step: int, **figures: float | str) -> None:
        self._step = step
        self._live.update(self._task, completed=step, figures=_figures(figures))


class _LineProgress(_Steps):
    """Plain lines for files and pipes."""

    def __init__(self, description: str, total: int) -> None:
        super().__init__(description, total)
        self._start = self._last = time.monotonic()
        self._figures: list[str] = []

    def update(self, step: int, **figures: float | str) -> None:
        self._step, self._figures = step, _figures(figures)
        now = time.monotonic()
        if now - self._last >= LOG_INTERVAL:
            self._last = now
            left = (now - self._start) / max(step, 1) * max(self._total - step, 0)
            self._line(f"{duration(left)} left" if step else "")

    def close(self) -> None:
        self._line(f"{duration(time.monotonic() - self._start)} total")

    def _line(self, end: str) -> None:
        note("  ".join([str(self), *self._figures, end]).rstrip())


def _figures(figures: Mapping[str, float | str]) -> list[str]:
    """Format figures: `tokens_per_s=1234.0` becomes `tokens/s 1,234`."""
    return [f"{name.replace('_per_', '/').replace('_', ' ')} {cell_text(value)}" for name, value in figures.items()]


def duration(seconds: float) -> str:
    """Format seconds, such as `4 min 07 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
