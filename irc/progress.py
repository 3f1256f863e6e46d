"""Progress: what long work reports to, whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Where a loop reports to."""

    def update(self, step: int, **figures: float | str) -> None:
        """Report that `step` steps are done."""


ProgressFactory = Callable[[str, int], AbstractContextManager[Progress]]
"""Makes a progress bar from what is running and the number of steps."""


class _Nothing:
    def update(self, step: int, **figures: float | str) -> None:
        """Say nothing."""


@contextmanager
def silent(name: str, total: int) -> Iterator[Progress]:
    """Make a progress bar that nobody sees: of a rehearsal, or of a process that is not the first."""
    yield _Nothing()
