"""Weights that stay in their file's type until an export reads each of them once: placeholders stand for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_LEAST = 1 << 16
"""Numbers that a weight must have to be worth a placeholder."""


class StoredWeights:
    """Large weights of a checkpoint in another type than the model's, and a placeholder for each.

    A placeholder has the shape and the type that the model wants, and one number for each row, a NaN. A model with
    placeholders can be captured and exported; run, it computes NaN.
    """

    def __init__(self) -> None:
        # The placeholders' numbers too: an address belongs to one tensor as long as that lives.
        self._stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The weights, as they are stored."""
        return [stored for stored, _ in self._stored.values()]

    def placeholder(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Return what stands for a weight in a model of a type; None if the weight itself should.

        Args:
            stored: A weight as its file has it, on the CPU.
            dtype: Type of the model.
        """
        if stored.dtype == dtype or stored.dim() != 2 or stored.numel() < _LEAST:
            return None
        rows = torch.full((len(stored),), math.nan, dtype=dtype)
        self._stored[rows.data_ptr()] = stored.detach(), rows
        return rows[:, None].expand(stored.shape)

    def find(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        """Return what reads the weight that a placeholder, or a range of its rows, stands for; None for others.

        The weight then has the placeholder's type.
        """
        found = self._stored.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return None
        stored, _ = found
        assert tensor.stride() == (1, 0), "something was computed with a placeholder"
        first = tensor.storage_offset()
        rows, dtype = stored[first : first + len(tensor)], tensor.dtype
        return lambda: rows.to(dtype)
