"""Formerly `irc.runtime.parity`, with the arguments of version 0.1; now `irc.deployment.verification`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from irc.deployment.verification import Sample, tolerance_of
from irc.deployment.verification import verify as _verify
from irc.progress import ProgressFactory


def verify(folder: Path, progress: ProgressFactory, **options: Any) -> dict[str, Any]:
    """Compare an ONNX folder with PyTorch on real text.

    Args:
        folder: What `irc export` wrote.
        progress: Makes progress bars.
        **options: `data`, `tokens`, `seq_len`, `prompts` and `new_tokens` (the fields of `Sample`), `bundle`, `base`,
            `provider`, `ops` and `tolerance`.
    """
    sample = {field.name: options.pop(field.name) for field in fields(Sample) if field.name in options}
    return _verify(folder, progress, Sample(**sample), **options)


__all__ = ["tolerance_of", "verify"]
