"""Rounding by GPTQ: a product's error falls, and nothing but the numbers of the blocks changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters.onnx_format import Quantization
from exporters.onnx_quantize import dequantize, quantize
from exporters.onnx_rounding import compensate

FORMS = [Quantization(4, 32), Quantization(4, 16, symmetric=True), Quantization(8, 32), Quantization(4, 64)]


def correlated(tokens: int, width: int) -> torch.Tensor:
    """Inputs that lie near a space of few dimensions, as those of a language model do."""
    torch.manual_seed(0)
    return torch.randn(tokens, 12) @ torch.randn(12, width) + 0.3 * torch.randn(tokens, width)


@pytest.mark.parametrize("how", FORMS, ids=str)
def test_the_error_of_the_product_falls_on_inputs_that_were_not_read(how: Quantization) -> None:
    out, width = 24, 80  # the last block is not full
    weight = torch.randn(out, width)
    inputs = correlated(2000, width)
    read, unread = inputs[:1000], inputs[1000:]
    nearest = quantize(weight.numpy(), how)
    again = compensate(weight.numpy(), read.T @ read / len(read), nearest, how)
    errors = [
        (unread @ (torch.from_numpy(dequantize(blocks, width, how)) - weight).T).square().mean().item()
        for blocks in (nearest, again)
    ]
    assert errors[1] < 0.6 * errors[0]
    assert again.packed.shape == nearest.packed.shape
    assert again.packed.dtype == np.uint8
    assert np.array_equal(again.scales, nearest.scales)
    assert again.zeros is nearest.zeros


def test_inputs_without_correlation_leave_the_nearest_numbers() -> None:
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    how = Quantization(4, 32)
    nearest = quantize(weight, how)
    again = compensate(weight, torch.eye(64), nearest, how)
    off = np.abs(dequantize(again, 64, how) - dequantize(nearest, 64, how))
    assert (off > 0).mean() < 0.02  # halves may be rounded the other way


def test_a_row_of_zeros_stays_one() -> None:
    how = Quantization(4, 32)
    weight = np.zeros((3, 32), np.float32)
    again = compensate(weight, torch.eye(32), quantize(weight, how), how)
    assert not dequantize(again, 32, how).any()
