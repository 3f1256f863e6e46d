"""Resolves names of devices, and refuses devices that this machine does not have."""

from __future__ import annotations

import re

from irc.errors import InputError

NAMES = "auto, cpu, cuda, cuda:N or mps"


def is_device(name: str) -> bool:
    """Return whether a name is one of `NAMES`, whether or not this machine has the device."""
    return re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name) is not None


def find_device(name: str) -> str:
    """Return the device that a name means on this machine; `auto` means a GPU if there is one, or the CPU.

    Args:
        name: One of `NAMES`.

    Raises:
        InputError: The name is not one of a device, or PyTorch does not find the device.
    """
    import torch

    if not isinstance(name, str) or not is_device(name):
        raise InputError(f"unknown device {name!r}; use {NAMES}", options=("device",))
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not found:
            raise InputError(f"device is '{name}', but PyTorch finds no CUDA device; use cpu", options=("device",))
        if int(name.partition(":")[2] or 0) >= found:
            last = f"cuda:{found - 1}"
            raise InputError(f"device is '{name}', but PyTorch finds devices up to {last}", options=("device",))
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("device is 'mps', but PyTorch finds no Apple GPU; use cpu", options=("device",))
    return name
