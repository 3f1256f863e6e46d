"""Kill `irc convert` and `irc export` at random moments, again and again; see that each is finished afterwards.

    python examples/kill_and_resume.py --kills 100

A run is killed by SIGKILL at a moment drawn from what it needs unbroken. Then the output must be whole or not there at
all, and the next run (convert with --resume) must come to its end with an output that is, bit for bit, the one that was
never killed (times and paths aside). Exit code 1 where it is not. Every third kill is one of an export.
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
    "router.teach_steps=2 eval_tokens=1024 checkpoint_seconds=0 precision=fp32"
).split()
# Of a process that has imported everything and captured once: kills hit what irc does.
FORK = multiprocessing.get_context("fork")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/kill"), help="A folder of its own; it is emptied.")
    arguments = parser.parse_args()
    small = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    capture(small, torch.float32)  # for which PyTorch imports much that it imports late
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    text = ["--data", arguments.data, "--seq-len", str(arguments.seq_len), "--device", "cpu"]
    convert = Killed("convert", ["convert", arguments.model, *text, *settings], ["--resume"], arguments)
    export = Killed("export", ["export", str(convert.whole)], [], arguments)
    draw = random.Random(arguments.seed)
    for number in range(arguments.kills):
        (export if number % 3 == 2 else convert).kill_once(draw)
    for verb in (convert, export):
        verb.report()
    return 1 if convert.faults or export.faults else 0


class Killed:
    """A verb, its unbroken result, and what became of the broken ones."""

    def __init__(self, verb: str, command: list[str], again: list[str], arguments: argparse.Namespace) -> None:
        self.verb, self.command, self.again = verb, command, again
        self.whole, self.output = arguments.work / f"{verb}-whole", arguments.work / f"{verb}-killed"
        self.said = arguments.work / f"{verb}.log"
        self.kills: dict[str, int] = {}
        self.finished = 0
        self.faults: list[str] = []
        started = time.monotonic()
        code, said = self._wait(self._start(self.whole, []))
        if code:
            sys.exit(f"irc {verb} does not work unbroken: {said}")
        self.seconds = time.monotonic() - started
        print(f"irc {verb}: {self.seconds:.1f} s unbroken", flush=True)

    def kill_once(self, draw: random.Random) -> None:
        """Start the verb, kill it, and let the next run finish; one that ends before its kill does not count."""
        while True:
            process = self._start(self.output, self.again)
            process.join(draw.uniform(0, self.seconds))
            process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                where = self._where()
                self.kills[where] = self.kills.get(where, 0) + 1
                print(f"irc {self.verb}: killed {where}", flush=True)
                self._check_whole_or_absent()
                self._take(*self._wait(self._start(self.output, self.again)))
                return
            self._take(*self._wait(process))

    def report(self) -> None:
        where = ", ".join(f"{count} {place}" for place, count in sorted(self.kills.items()))
        print(f"irc {self.verb}: {sum(self.kills.values())} kills ({where}), {self.finished} finished and identical")
        left = len([path for path in self.output.parent.iterdir() if path.name.endswith((".new", ".old"))])
        if left:
            print(f"  {left} folders of killed writes lie beside the output so far (hidden, .new)")
        for fault in self.faults:
            print(f"  FAULT: {fault}")

    def _start(self, output: Path, more: list[str]) -> BaseProcess:
        process = FORK.Process(target=run_irc, args=([*self.command, "-o", str(output), *more], self.said))
        process.start()
        return process

    def _wait(self, process: BaseProcess) -> tuple[int, str]:
        process.join()
        return process.exitcode or 0, self.said.read_text().strip()[-500:]

    def _where(self) -> str:
        """Say how far the killed run was."""
        if self.output.exists():
            return "after the output was there"
        if any(path.name.startswith(f".{self.output.name}.") for path in self.output.parent.iterdir()):
            return "while files lay beside the output"
        work = self.output.with_name(f"{self.output.name}.partial")
        if not work.exists():
            return "before anything was written"
        done = {path.name for path in work.iterdir()}
        return next(
            (
                text
                for name, text in (("router.json", "after both stages"), ("lff.json", "in stage router"))
                if name in done
            ),
            "in stage lff or before",
        )

    def _check_whole_or_absent(self) -> None:
        if self.output.exists():
            self._compare("left by a kill")

    def _take(self, code: int, said: str) -> None:
        if code:
            self.faults.append(f"did not finish: {said}")
        else:
            self.finished += 1
            self._compare("finished")
        shutil.rmtree(self.output, ignore_errors=True)

    def _compare(self, what: str) -> None:
        expected, found = contents(self.whole), contents(self.output)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                self.faults.append(f"{what}: {name} is another")


def run_irc(arguments: list[str], said: Path) -> None:
    with said.open("w") as opened:
        os.dup2(opened.fileno(), sys.stdout.fileno())
        os.dup2(opened.fileno(), sys.stderr.fileno())
    sys.exit(irc_main(arguments))


def contents(folder: Path) -> dict[str, Any]:
    """Return a folder's files by name: JSON without times and paths, the rest as bytes."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: untimed(path) if name.endswith(".json") else path.read_bytes() for name, path in files.items()}


def untimed(path: Path) -> Any:
    def drop(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: drop(one) for key, one in value.items() if "seconds" not in key and key != "output"}
        return value

    return drop(json.loads(path.read_text()))


if __name__ == "__main__":
    sys.exit(main())
