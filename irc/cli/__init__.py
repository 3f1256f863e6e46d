"""The command line: one file per command, imported only when needed.

Commands parse their arguments, call the library and print what it returns.
"""

from irc.cli.group import main

__all__ = ["main"]
