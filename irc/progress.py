"""Progress of long work, independent of how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from irc.errors import Interrupted


class Progress(Protocol):
    """Receives the progress of a loop."""

    def update(self, step: int, **figures: float | str) -> None:
        """Report that `step` steps are done, and the latest figures (`loss=2.3`)."""


ProgressFactory = Callable[[str, int], AbstractContextManager[Progress]]
"""Makes a progress bar from a description and a number of steps."""


class _Silent:
    def update(self, step: int, **figures: float | str) -> None:
        """Show nothing."""


@contextmanager
def silent(name: str, total: int) -> Iterator[Progress]:
    """Make an invisible progress bar, for a dry run or for the other processes of a distributed run."""
    yield _Silent()


@contextmanager
def place(name: object) -> Iterator[None]:
    """Let an interrupt (Ctrl-C) of the block say where it stopped.

    Args:
        name: What the block works on; its text is asked for when the interrupt comes.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(str(name))
        raise


@contextmanager
def resumable() -> Iterator[None]:
    """Let an interrupt (Ctrl-C) of the block say that its work can be resumed.

    Raises:
        Interrupted: In place of KeyboardInterrupt.
    """
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        raise Interrupted from error
