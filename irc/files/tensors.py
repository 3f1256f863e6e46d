"""Writes safetensors files atomically."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

from irc.errors import IrcError


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically: write `NAME.tmp` next to it, sync it to disk, then rename.

    Args:
        path: Where the file goes.
        tensors: Tensors by name, of any shape and data type.
        metadata: Text by key, stored in the file's header.

    Raises:
        IrcError: The file could not be written.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # the usual mode; safetensors creates files that only their owner can read
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata)
        with suppress(OSError):  # some network file systems have no modes
            partial.chmod(mode)
        with partial.open("rb") as opened:
            os.fsync(opened.fileno())
        os.replace(partial, path)
    except Exception as error:
        advice = "free some space and resume the run"
        raise IrcError(f"{path}: could not be written ({error}); {advice}", options=("resume",)) from error
    finally:  # an interrupt is not an Exception and must not leave the partial file either
        partial.unlink(missing_ok=True)
