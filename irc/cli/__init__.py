"""The command line: one file per command, imported only when needed. Commands parse and print; the library does the work."""

from irc.cli.group import main

__all__ = ["main"]
