"""Keeps interrupts from being lost or renamed in code of other libraries.

torch.export runs Python code from C++ and in callbacks. An exception that a signal raises there may come out as another
one, which would be taken for a fault of the model, or not at all.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """End the block with the first exception that a signal handler raised in it, whatever became of that exception."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised: list[BaseException] = []

    def recording(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], Any]:
        def handle(number: int, frame: FrameType | None) -> None:
            try:
                handler(number, frame)
            except BaseException as error:
                raised.append(error)
                raise

        return handle

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, recording(handler))
        yield
    except BaseException as error:
        if raised and error is not raised[0]:
            raise raised[0] from error
        raise
    finally:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handler)
    if raised:
        raise raised[0]
