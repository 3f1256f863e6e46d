"""The number types of weights: our short names, those of PyTorch, and how many bytes a number takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LONG_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def torch_dtype(name: str) -> torch.dtype:
    """Return the type of a short or a long name.

    Raises:
        KeyError: There is no such type; the names are the keys and values of `LONG_NAMES`.
    """
    import torch

    long = LONG_NAMES.get(name, name)
    if long not in LONG_NAMES.values():
        raise KeyError(name)
    dtype: torch.dtype = getattr(torch, long)
    return dtype


def short_name(dtype: torch.dtype) -> str:
    """Return fp32, fp16 or bf16.

    Raises:
        KeyError: It is none of these.
    """
    return {f"torch.{long}": short for short, long in LONG_NAMES.items()}[str(dtype)]
