"""Processes that start quickly, because they are forked from a server that has imported everything.

Tests use them to run the command line, or two processes as torchrun does, without waiting for the imports again. They
share no state with the test process. Other tests start the launchers themselves and `python -m irc`.
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
    """A process that runs a function and writes its output to files, with the interface of subprocess.Popen.

    Args:
        function: A function of a module that can be imported. It returns the exit code.
        *arguments: Arguments of the function.
        folder: Folder for the output; created if it does not exist.
        environment: Variables to add to the environment of this process.
    """

    def __init__(
        self,
        function: Callable[..., int],
        *arguments: Any,
        folder: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = (folder / "stdout", folder / "stderr")
        context = (str(Path.cwd()), environment or {})  # the server may run in another folder
        self._process = SERVER.Process(target=_run, args=(function, arguments, self._outputs, *context))
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
        """Wait for the end of the process; return its output and errors.

        Raises:
            subprocess.TimeoutExpired: The process did not end within `timeout` seconds, and was killed.
        """
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()  # pytest would wait for it
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        out, err = (path.read_text() if path.exists() else "" for path in self._outputs)
        return out, err


def _run(
    function: Callable[..., int],
    arguments: tuple[Any, ...],
    outputs: tuple[Path, Path],
    cwd: str,
    environment: dict[str, str],
) -> None:
    for number, path in enumerate(outputs, start=1):
        with path.open("w") as opened:
            os.dup2(opened.fileno(), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    os.chdir(cwd)
    os.environ.update(environment)
    sys.exit(function(*arguments))
