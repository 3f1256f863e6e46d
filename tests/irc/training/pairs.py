"""The work of each process in test_distributed.py. As a script: `irc`, which reports its memory at the end."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from irc.cli import main
from irc.conversion import pipeline
from irc.training.master_weights import MasterAdamW
from irc.training.sharding import average_gradients


def launched(function: Callable[..., Any], *arguments: Any) -> int:
    """Run a function in two forked processes, as torchrun does; report how each ended, or how the first one failed."""
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, 2, **meeting, start_method="fork", max_restarts=0)
    ended: Any
    try:
        ended = list(elastic_launch(config, function)(*arguments).values())
    except ChildFailedError as error:
        ended = error.get_first_failure()[1].exitcode
    sys.stderr.write(f"\nended {json.dumps(ended)}\n")
    return 0


def looking(command: list[str]) -> int:
    """Run `irc` with one more phase, which reports how much of the mapped base a process holds as its own copy."""

    def look(conversion: Any) -> None:
        name = str(conversion.base.shards[0].resolve())
        mappings = Path("/proc/self/smaps").read_text().split("VmFlags")
        own = [part.split("Anonymous:")[1].split()[0] for part in mappings if name in part]
        sys.stderr.write(f"kB of the mapped base in copies: {own}\n")  # in one write, because both processes print

    pipeline.PHASES = (*pipeline.PHASES, ("look", look))
    return main(command)


def dying(command: list[str]) -> int:
    """Run `irc`; its first process dies by SIGKILL when it renames its third checkpoint of the router stage."""
    written = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith("router.checkpoint.safetensors"):
            written.append(event)
            if len(written) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return main(command)


def several(commands: list[list[str]]) -> list[int]:
    """Run `irc` for several commands, one after the other."""
    return [main(command) for command in commands]


def caching(folder_and_command: tuple[str, list[str]]) -> int:
    """Run `irc` with another cache of the Hub; this process has read HF_HOME already."""
    constants.HF_HOME, command = folder_and_command
    return main(command)


def ending(command: list[str]) -> None:
    """Run `irc` and exit with its code."""
    sys.exit(main(command))


def averaging(dtype: str) -> dict[str, list[float]]:
    """Take steps of AdamW on three weights with gradients from all processes, from one process, and from none."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    weights = {name: torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=getattr(torch, dtype))) for name in "abc"}
    adam = MasterAdamW([{"params": list(weights.values()), "lr": 0.1}], weight_decay=0.5)
    for step in range(3):
        loss = (2 * rank + 1) * weights["a"].square().sum() + (4 * weights["b"].sum() if rank == step % 2 else 0)
        loss.backward()
        adam.take_gradients()
        average_gradients([adam.master(weight) for weight in weights.values()])
        adam.step()
        adam.zero_grad()
    torch.distributed.destroy_process_group()
    return {name: weight.tolist() for name, weight in weights.items()}


if __name__ == "__main__":
    sys.exit(looking(sys.argv[1:]))
