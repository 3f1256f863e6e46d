"""The two consoles (stdout and stderr), lines for people, and one JSON object for tools."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from rich.color import ColorSystem
from rich.console import Console
from rich.text import Text

_PIPE_WIDTH = 200
_json_mode = False


def set_json_mode(enabled: bool) -> None:
    """Send everything except `emit_json` to stderr, so that stdout holds one JSON object."""
    global _json_mode
    _json_mode = enabled


def results() -> Console:
    """Return the console for results: stdout, or stderr in JSON mode."""
    return _console(stderr=_json_mode)


def messages() -> Console:
    """Return the console for progress, logs and errors: stderr."""
    return _console(stderr=True)


@cache
def _console(stderr: bool) -> Console:
    """Return the only console of a stream; a live bar and lines printed meanwhile must share it."""
    stream = sys.stderr if stderr else sys.stdout
    follows = stream.isatty() and "COLUMNS" not in os.environ  # rich takes COLUMNS=0 at its word
    width = None if follows else shutil.get_terminal_size((_PIPE_WIDTH, 0)).columns
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def width() -> int:
    """Return the width of the results console, in columns."""
    return results().width


def say(message: str = "", style: str | None = None) -> None:
    """Show a line of the result on stdout; the terminal wraps long lines.

    Args:
        message: The text.
        style: A rich style such as `bold` or `green`.
    """
    results().print(message, style=style, soft_wrap=True)


def stream(piece: str, style: str | None = None) -> None:
    """Show a piece of growing text on stdout, at once and unchanged.

    On a terminal, the piece gets the style, and control characters are replaced.
    """
    console = results()
    if console.is_terminal:
        piece = _printable(piece)
        piece = console.get_style(style).render(piece, color_system=_colours(console)) if style else piece
    console.file.write(piece)
    console.file.flush()


def _printable(text: str) -> str:
    """Replace control characters, which names in other people's files may contain; a terminal would obey them."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def _colours(console: Console) -> ColorSystem | None:
    return None if console.no_color or console.color_system is None else ColorSystem.STANDARD


def note(message: str, style: str | None = None) -> None:
    """Show a line about the work (what is loaded, what is slow) on stderr."""
    messages().print(_printable(message), style=style, soft_wrap=True)


def warn(message: str) -> None:
    """Show a warning on stderr."""
    messages().print(Text.assemble(("warning: ", "bold yellow"), _printable(message)), soft_wrap=True)


def fail(message: str) -> None:
    """Show on stderr why a command failed; the caller chooses the exit code."""
    messages().print(Text.assemble(("error: ", "bold red"), _printable(message)), soft_wrap=True)


def emit_json(data: Mapping[str, object]) -> None:
    """Write one JSON object to stdout.

    Paths become strings; one-element tensors and arrays become numbers; infinities and NaN, which JSON lacks, become
    null.

    Raises:
        TypeError: A value has no JSON form. Nothing is written then.
    """
    text = json.dumps(_plain(data), indent=2, allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    scalar = getattr(value, "item", None)
    if callable(scalar):
        return _plain(scalar())
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    raise TypeError(f"a {type(value).__name__} has no JSON form: {value!r}")


class ConsoleHandler(logging.Handler):
    """A logging handler that writes through the stderr console, above any live bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record; warnings and errors are marked."""
        try:
            message = self.format(record)
            if record.levelno >= logging.WARNING:
                warn(message)
            else:
                note(message, style="dim")
        except Exception:
            self.handleError(record)
