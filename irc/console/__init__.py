"""Output: results on stdout, everything else on stderr. This is the only package that imports rich.

Colours, boxes and live bars appear only on terminals, and NO_COLOR turns colours off. Text is shown literally: square
brackets in a path are not markup.
"""

from irc.console.layout import bar, table, tree
from irc.console.live import ProgressBar, duration, progress
from irc.console.output import ConsoleHandler, emit_json, fail, note, say, set_json_mode, stream, warn, width
from irc.console.plot import plot
from irc.console.styled import Styled, shade

__all__ = [
    "ConsoleHandler",
    "ProgressBar",
    "Styled",
    "bar",
    "duration",
    "emit_json",
    "fail",
    "note",
    "plot",
    "progress",
    "say",
    "set_json_mode",
    "shade",
    "stream",
    "table",
    "tree",
    "warn",
    "width",
]
