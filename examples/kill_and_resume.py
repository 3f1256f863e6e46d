"""Kill `irc convert` and `irc export` at random moments, again and again; see that each is finished afterwards.

    python examples/kill_and_resume.py --kills 100

Each run is killed by SIGKILL at a random moment. Afterwards the output must be complete or absent, and the next run
(convert with --resume) must finish with the same output as a run that was never killed, bit for bit except for times
and paths. The exit code is 1 if that fails. Every third kill hits an export.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import irc.conversion.pipeline
import irc.deployment.onnx_folder  # noqa: F401
from irc.cli import main as irc_main
from irc.model.capture import capture

SETTINGS = (
    "lff.tokens=2048 lff.steps=6 lff.batch_size=4 router.steps=20 router.batch_size=4 router.calibration_tokens=4096 "
    "router.teach_steps=2 eval_tokens=1024 yardstick_tokens=0 checkpoint_seconds=0 precision=fp32"
).split()
# The parent process has imported everything and captured a model once, so kills hit the work of irc, not its imports.
FORK = multiprocessing.get_context("fork")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/kill"), help="Work folder; it is emptied first.")
    arguments = parser.parse_args()
    small = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    capture(small, torch.float32)  # triggers PyTorch's late imports
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    text = ["--data", arguments.data, "--seq-len", str(arguments.seq_len), "--device", "cpu"]
    convert = Victim("convert", ["convert", arguments.model, *text, *settings], ["--resume"], arguments)
    export = Victim("export", ["export", str(convert.whole)], [], arguments)
    draw = random.Random(arguments.seed)
    for number in range(arguments.kills):
        (export if number % 3 == 2 else convert).kill_once(draw)
    for verb in (convert, export):
        verb.report()
    return 1 if convert.faults or export.faults else 0


class Victim:
    """A command to kill: its undisturbed output, and the outcome of the runs after a kill.

    Args:
        verb: Name of the command.
        command: Arguments of the command line, without the output.
        resume: Further arguments of every run but the first.
        arguments: Arguments of this script.
    """

    def __init__(self, verb: str, command: list[str], resume: list[str], arguments: argparse.Namespace) -> None:
        self.verb, self.command, self.resume = verb, command, resume
        self.whole, self.output = arguments.work / f"{verb}-whole", arguments.work / f"{verb}-killed"
        self.log = arguments.work / f"{verb}.log"
        self.kills: dict[str, int] = {}
        self.finished = 0
        self.faults: list[str] = []
        started = time.monotonic()
        code, output = self._wait(self._start(self.whole, []))
        if code:
            sys.exit(f"irc {verb} fails without a kill: {output}")
        self.seconds = time.monotonic() - started
        print(f"irc {verb}: {self.seconds:.1f} s without a kill", flush=True)

    def kill_once(self, draw: random.Random) -> None:
        """Start the command, kill it, and let the next run finish. A run that ends before its kill does not count."""
        while True:
            process = self._start(self.output, self.resume)
            process.join(draw.uniform(0, self.seconds))
            process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                moment = self._moment_of_kill()
                self.kills[moment] = self.kills.get(moment, 0) + 1
                print(f"irc {self.verb}: killed {moment}", flush=True)
                self._check_whole_or_absent()
                self._check_finished(*self._wait(self._start(self.output, self.resume)))
                return
            self._check_finished(*self._wait(process))

    def report(self) -> None:
        moments = ", ".join(f"{count} {moment}" for moment, count in sorted(self.kills.items()))
        print(f"irc {self.verb}: {sum(self.kills.values())} kills ({moments}), {self.finished} finished and identical")
        left = len([path for path in self.output.parent.iterdir() if path.name.endswith((".new", ".old"))])
        if left:
            print(f"  {left} hidden folders of killed writes (.new, .old) are left next to the output")
        for fault in self.faults:
            print(f"  FAULT: {fault}")

    def _start(self, output: Path, more: list[str]) -> BaseProcess:
        process = FORK.Process(target=run_irc, args=([*self.command, "-o", str(output), *more], self.log))
        process.start()
        return process

    def _wait(self, process: BaseProcess) -> tuple[int, str]:
        process.join()
        return process.exitcode or 0, self.log.read_text().strip()[-500:]

    def _moment_of_kill(self) -> str:
        """Describe how far the killed run had come."""
        if self.output.exists():
            return "after the output was written"
        if any(path.name.startswith(f".{self.output.name}.") for path in self.output.parent.iterdir()):
            return "while the output was written"
        work = self.output.with_name(f"{self.output.name}.partial")
        if not work.exists():
            return "before anything was written"
        if (work / "router.json").exists():
            return "after both stages"
        if (work / "lff.json").exists():
            return "in stage router"
        return "in stage lff or before"

    def _check_whole_or_absent(self) -> None:
        if self.output.exists():
            self._compare("left by a kill")

    def _check_finished(self, code: int, output: str) -> None:
        if code:
            self.faults.append(f"did not finish: {output}")
        else:
            self.finished += 1
            self._compare("finished")
        shutil.rmtree(self.output, ignore_errors=True)

    def _compare(self, when: str) -> None:
        expected, found = contents(self.whole), contents(self.output)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                self.faults.append(f"{when}: {name} differs")


def run_irc(arguments: list[str], log: Path) -> None:
    with log.open("w") as opened:
        os.dup2(opened.fileno(), sys.stdout.fileno())
        os.dup2(opened.fileno(), sys.stderr.fileno())
    sys.exit(irc_main(arguments))


def contents(folder: Path) -> dict[str, Any]:
    """Return the files of a folder by name: JSON without times and paths, all others as bytes."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: untimed(path) if name.endswith(".json") else path.read_bytes() for name, path in files.items()}


def untimed(path: Path) -> Any:
    def drop(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: drop(item) for key, item in value.items() if "seconds" not in key and key != "output"}
        return value

    return drop(json.loads(path.read_text()))


if __name__ == "__main__":
    sys.exit(main())
