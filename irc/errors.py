"""The exceptions that `irc` raises on purpose, each with the exit code that the command line gives it."""

from __future__ import annotations


class IrcError(Exception):
    """A failure that the user can act on; the message says what is wrong, where, and what to do.

    The message names things as Python does. The command line shows it and adds the options of the running command that
    help, so that no message spells an option out.

    Attributes:
        options: Names of the parameters that help, such as `force` or `seq_len`, or fields of the recipe.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, options: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.options = options


class InputError(IrcError):
    """The user's input (a path, an option, a file's content) cannot be used."""

    exit_code = 2


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped work that can be resumed; the notes of the exception and of its causes say where."""


class GateMissed(IrcError):
    """A limit that the user set was missed, such as the tolerance of `irc verify`."""

    exit_code = 3
