"""Rounding that makes up for its errors (GPTQ, arXiv 2210.17323): later columns take up what earlier ones lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from exporters.onnx_format import Quantization
from exporters.onnx_quantize import Blocks, packed_numbers, parts, unpacked_zeros
from exporters.onnx_weights import held

_DAMPING = 0.01
"""Added to the diagonal of the inputs' second moments, over its mean."""
_COLUMNS = 128
"""Columns whose errors reach the columns behind them together."""
_ROWS = 8192
"""Rows at a time: they do not depend on each other, and an embedding has many."""


class Gptq:
    """Rounds weights of products again; those whose inputs are not known keep their numbers.

    Attributes:
        unread: Names of the weights that kept them.

    Args:
        moments: See `exporters.onnx_weights.WeightSource`.
        how: How weights are quantized.
    """

    def __init__(self, moments: Callable[[torch.Tensor], torch.Tensor | None], how: Quantization) -> None:
        self.unread: list[str] = []
        self._moments, self._how = moments, how

    def __call__(self, weight: ir.Value, values: NDArray[Any], blocks: Blocks) -> Blocks:
        """Return a weight's new blocks, given its numbers and the blocks of the nearest."""
        tensor = held(weight)
        found = None if tensor is None else self._moments(tensor)
        if found is None:
            self.unread.append(str(weight.name))
            return blocks
        return compensate(values, found, blocks, self._how)


def compensate(weight: NDArray[np.float32], moments: torch.Tensor, blocks: Blocks, how: Quantization) -> Blocks:
    """Round a weight again, with the scales and zero points that it has.

    Args:
        weight: float32 [out, in].
        moments: Second moments of the inputs, float [in, in]: x xT over tokens, summed or averaged.
        blocks: The weight, rounded to the nearest numbers.
        how: How it was rounded.

    Returns:
        Blocks with other numbers, with which the product's mean squared error is smaller.
    """
    factor = _factor(moments)
    scales, zeros = blocks.scales.astype(np.float32), unpacked_zeros(blocks, how).astype(np.float32)
    numbers = np.empty(weight.shape, np.uint8)
    for rows in parts(len(weight), _ROWS):
        left = torch.from_numpy(weight[rows].astype(np.float32, copy=True))
        found = _rounded(left, factor, torch.from_numpy(scales[rows]), torch.from_numpy(zeros[rows]), how)
        numbers[rows] = found.numpy()
    return packed_numbers(numbers, blocks, how)


def _rounded(
    left: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, how: Quantization
) -> torch.Tensor:
    """Return the numbers of some rows, uint8 [rows, in]; `left` is used up."""
    numbers = torch.empty_like(left, dtype=torch.uint8)
    for columns in parts(left.shape[1], _COLUMNS):
        errors = torch.empty(len(left), columns.stop - columns.start)
        for column in range(columns.start, columns.stop):
            scale, zero = scales[:, column // how.block_size], zeros[:, column // how.block_size]
            divisor = torch.where(scale == 0, 1, scale)
            number = (left[:, column] / divisor + zero).round_().clamp_(0, 2**how.bits - 1)
            numbers[:, column] = number
            error = (left[:, column] - (number - zero) * scale) / factor[column, column]
            behind = slice(column + 1, columns.stop)
            left[:, behind] -= error[:, None] * factor[column, behind]
            errors[:, column - columns.start] = error
        left[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return numbers


def _factor(moments: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of damped moments, float32 [in, in]."""
    damped = moments.double()
    damped = damped + _DAMPING * damped.diagonal().mean() * torch.eye(len(damped), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
