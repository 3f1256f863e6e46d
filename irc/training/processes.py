"""The group of processes that torchrun or accelerate launch started: which one this is, and how it joins the others.

A group exists where `WORLD_SIZE` is 2 or more. Without it, a rank in the environment means nothing: schedulers and
scripts leave some there, and settings of accelerate. The variables of MPI are not read.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

from irc.errors import InputError, IrcError
from irc.files.untrusted import first_line

log = logging.getLogger(__name__)

_SIZE, _RANK, _LOCAL_RANK, _ADDRESS, _PORT = "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
_OF_MPI = ("PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE")
_OF_ACCELERATE = "ACCELERATE_"
_REMEDY = f"start the processes with torchrun or accelerate launch, or unset {_SIZE} to convert in one process"
_MOST_DIGITS = 20
_JOIN_SECONDS = 600.0
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Group:
    """This process's place among the processes of a run.

    Attributes:
        size: Number of processes.
        rank: Number of this process, from 0; 0 writes the files.
        local_rank: Number of this process among those of its machine.
        address: HOST:PORT at which the processes meet; empty for one process.
    """

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    address: str = ""


def group() -> Group:
    """Return the group that the environment describes.

    Raises:
        InputError: A variable of a group is missing or is not a number that it can be.
    """
    size = _number(_SIZE, 1) if os.environ.get(_SIZE) else 1
    if size == 1:
        return Group()
    missing = [name for name in (_RANK, _LOCAL_RANK, _ADDRESS, _PORT) if not os.environ.get(name)]
    if missing:
        raise InputError(f"{_SIZE} is {size}, but {', '.join(missing)} is not set; {_REMEDY}")
    address = f"{os.environ[_ADDRESS]}:{_number(_PORT, 0, 65_535)}"
    return Group(size, _number(_RANK, 0, size - 1), _number(_LOCAL_RANK, 0, size - 1), address)


def is_main_process() -> bool:
    """Return whether this process writes files and messages; the other processes of a group do not."""
    return group().rank == 0


def join_group(device: str) -> PartialState:
    """Join the other processes of the group, if there are any. Joining again changes nothing.

    Args:
        device: `cpu`, or a GPU, which has other means to exchange tensors.

    Returns:
        accelerate's view of the processes.

    Raises:
        InputError: The environment does not describe a group.
        IrcError: The others did not come in time.
    """
    found = group()
    cpu = device == "cpu"
    if found.size == 1:
        with plain_environment():
            return PartialState(cpu=cpu)
    if not torch.distributed.is_initialized():
        backend = "gloo" if cpu else "nccl"
        torch.distributed.init_process_group(backend, store=_meet(found), rank=found.rank, world_size=found.size)
    return PartialState(cpu=cpu)


def _meet(found: Group) -> Any:
    """Wait until all processes have come; a thread waits, so that signals end the waiting."""
    from torch.distributed.rendezvous import rendezvous

    stores: list[Any] = []
    failures: list[Exception] = []

    def wait() -> None:
        try:
            limit = timedelta(seconds=_JOIN_SECONDS)
            stores.append(next(iter(rendezvous("env://", found.rank, found.size, timeout=limit)))[0])
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(1)
    if thread.is_alive():
        log.info(
            "process %d of %d waits for the others at %s, at most %.0f s",
            found.rank,
            found.size,
            found.address,
            _JOIN_SECONDS,
        )
    while thread.is_alive():
        thread.join(_LOOK_SECONDS)
    if failures:
        why = first_line(failures[0])
        raise IrcError(f"the {found.size} processes of {_SIZE} did not meet at {found.address} ({why}); {_REMEDY}")
    return stores[0]


@contextmanager
def plain_environment() -> Iterator[None]:
    """Hide variables that accelerate takes for a group's, or for its own settings, if this process is in no group.

    Raises:
        InputError: The environment does not describe a group.
    """
    names = (_SIZE, _RANK, _LOCAL_RANK, *_OF_MPI)
    stray = [name for name in os.environ if name in names or name.startswith(_OF_ACCELERATE)]
    hidden = {name: os.environ.pop(name) for name in stray} if group().size == 1 else {}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _number(name: str, least: int, most: int | None = None) -> int:
    text = os.environ[name]
    found = int(text) if text.strip().isdecimal() and len(text) < _MOST_DIGITS else -1
    if found < least or (most is not None and found > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"{name} is '{text[:40]}' in the environment, expected {bounds}; {_REMEDY}")
    return found
