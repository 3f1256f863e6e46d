"""An interrupt ends the block that it reached, also where a library swallows or renames it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from irc.model.interrupts import interrupts_kept


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """Shells let processes in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def renamed() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("as_strided(): argument 'size' failed to unpack the object at pos 2") from None


def swallowed() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def plain() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("work", [renamed, swallowed, plain])
def test_the_interrupt_comes_out(work: Callable[[], None]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        work()
    assert signal.getsignal(signal.SIGINT) is before


def test_other_errors_and_ignored_signals_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="mine"), interrupts_kept():
        raise ValueError("mine")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts_kept():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_can_capture_too() -> None:
    ran = []

    def work() -> None:
        with interrupts_kept():
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [True]
