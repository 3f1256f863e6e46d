"""Safetensors files, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from irc.errors import IrcError


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all: a temporary file beside it, synced, then renamed."""
    partial = path.with_name(path.name + ".tmp")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as of every file: safetensors makes its own for nobody else to read
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata)
        partial.chmod(mode)
        with partial.open("rb") as opened:
            os.fsync(opened.fileno())
        os.replace(partial, path)
    except Exception as error:
        raise IrcError(
            f"{path}: could not be written ({error}); free some space and try again with --resume"
        ) from error
    finally:  # an interrupt, which is no Exception, leaves nothing either
        partial.unlink(missing_ok=True)
