"""The exceptions that `irc` raises, each with the exit code that the command line gives it."""

from __future__ import annotations


class IrcError(Exception):
    """A failure that the user can act on; the message says what happened, where and what to do."""

    exit_code = 1


class InputError(IrcError):
    """The user's input (a path, a flag, a file's content) cannot be used as it is."""

    exit_code = 2


class GateMissed(IrcError):
    """A bound that the user set was not met."""

    exit_code = 3
