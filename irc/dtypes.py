"""Data types of weights as torch has them. The table of all types is `exporters.onnx_dtypes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporters.onnx_dtypes import FLOATS, of_weights

if TYPE_CHECKING:
    import torch

LONG_NAMES = {kind.short: kind.long for kind in FLOATS}
BYTES = {kind.short: kind.bytes for kind in FLOATS}


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's type for a short or a long name, such as `fp32` or `float32`.

    Raises:
        KeyError: There is no such type of weights.
    """
    import torch

    dtype: torch.dtype = getattr(torch, of_weights(name).long)
    return dtype


def short_name(dtype: torch.dtype) -> str:
    """Return `fp32`, `fp16` or `bf16`.

    Raises:
        KeyError: The type is not one of weights.
    """
    return of_weights(str(dtype).removeprefix("torch.")).short
