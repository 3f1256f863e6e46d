"""The device that a name means, refused in a sentence where it is not there."""

from __future__ import annotations

import re

from irc.errors import InputError

NAMES = "auto, cpu, cuda, cuda:N or mps"


def is_device(name: str) -> bool:
    """Say whether a name is one of `NAMES`, there or not."""
    return re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name) is not None


def find_device(name: str) -> str:
    """Return the device that a name means on this machine: its own, or for `auto` a GPU where there is one.

    Args:
        name: One of `NAMES`.

    Raises:
        InputError: It is no device, or PyTorch finds none of that name.
    """
    import torch

    if not isinstance(name, str) or not is_device(name):
        raise InputError(f"device is {name!r}; use {NAMES}")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not found:
            raise InputError(f"device is '{name}', but torch sees no CUDA device; use --device cpu")
        if int(name.partition(":")[2] or 0) >= found:
            raise InputError(f"device is '{name}', but the last CUDA device that torch sees is cuda:{found - 1}")
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("device is 'mps', but torch sees no Apple GPU; use --device cpu")
    return name
