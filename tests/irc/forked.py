"""Processes forked from one that has imported everything: each begins at once, and knows nothing of this one.

By multiprocessing's fork server, so that a test that starts the command line, or two processes as torchrun would, need
not wait for the imports again. The launchers themselves, and `python -m irc`, are tested by processes of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["irc.deployment.onnx_folder", "irc.training.lora", "tests.irc.loaded"])


class Forked:
    """A process that runs a function with what it says in files; used as subprocess.Popen is, in text mode.

    Args:
        function: Of a module that can be imported; what it returns is the exit code.
        *arguments: Of the function.
        folder: For what the process says; made if need be.
        environment: Added to that of the fork server, which is this process's.
    """

    def __init__(
        self,
        function: Callable[..., int],
        *arguments: Any,
        folder: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.said = (folder / "stdout", folder / "stderr")
        here = (str(Path.cwd()), environment or {})  # the fork server may have been started elsewhere
        self._process = SERVER.Process(target=_run, args=(function, arguments, self.said, *here))
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return what was said.

        Raises:
            subprocess.TimeoutExpired: It has not ended in that time, in seconds; it is killed.
        """
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()  # pytest would wait for it
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        out, err = (path.read_text() if path.exists() else "" for path in self.said)
        return out, err


def _run(
    function: Callable[..., int], arguments: tuple[Any, ...], said: tuple[Path, Path], cwd: str, more: dict[str, str]
) -> None:
    for number, path in enumerate(said, start=1):
        with path.open("w") as opened:
            os.dup2(opened.fileno(), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    os.chdir(cwd)
    os.environ.update(more)
    sys.exit(function(*arguments))
