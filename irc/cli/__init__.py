"""The command line: one lazily imported file a verb. It parses and shows; the library works."""

from irc.cli.group import main

__all__ = ["main"]
