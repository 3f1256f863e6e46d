"""Test cases for the kernels of matrix products: random inputs, exact results, and the allowed rounding errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from irc.bench.kernels.attention import choice
from passes import dialect  # noqa: F401 - registers the operators

PRODUCTS = ("RoutedMatMul", "RoutedGate", "Router", "ForecastAdd")
# Relative to the sum of the magnitudes of all terms. Kernels round one to four times.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Product:
    """Inputs of an operator and its expected output.

    Attributes:
        inputs: In the operator's order.
        exact: The exact output in float64, or in float32 if the operator's output is always float32.
        magnitude: The output for the magnitudes of all inputs. Rounding errors are relative to it.
    """

    inputs: list[Tensor]
    exact: Tensor
    magnitude: Tensor

    @property
    def kind(self) -> torch.dtype:
        """The data type of the output."""
        return self.inputs[0].dtype if self.exact.dtype == torch.float64 else self.exact.dtype

    def is_near(self, output: Tensor) -> bool:
        """Return whether an output is right up to rounding, with NaN exactly where it is expected."""
        if output.shape != self.exact.shape or output.dtype != self.kind:
            return False
        wrong = (output.double() - self.exact).abs() > TOLERANCES[self.inputs[0].dtype] * self.magnitude
        return bool((output.isnan() == self.exact.isnan()).all() and not wrong.any())

    def are_near(self, outputs: list[Tensor]) -> bool:
        """Return whether the only output of a node is right."""
        return self.is_near(outputs[0])


def draw_products(x: Tensor, rows: Tensor, generator: torch.Generator, padded: bool) -> dict[str, Product]:
    """Draw one product for each operator, with random numbers of rows and columns.

    Args:
        x: [batch, tokens, d].
        rows: Rows of x, int64 [1, rows, 2].
        generator: Source of the sizes and weights.
        padded: Whether rows (-1, -1) may follow, which only CUDA kernels accept.
    """
    irc = torch.ops.irc
    most_rows = choice(generator, 1, 3, 8, 40)
    real = rows[:, :most_rows]
    padding = torch.full((1, choice(generator, 0, 1, 5) if padded else 0, 2), -1)
    given = torch.cat((real, padding), 1)
    width, columns = x.shape[2], choice(generator, 8, 24, 36, 130, 7, 264)
    rank, inner = choice(generator, 3, 4, 16), choice(generator, width, 700)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(x.dtype)

    def draw_weight(shape: tuple[int, ...]) -> Tensor:
        weight: Tensor = torch.randn(shape, generator=generator) / shape[0] ** 0.5
        return weight.to(x.dtype)

    y = draw((1, given.shape[1], inner))
    y[:, real.shape[1] :] = 0  # Compact fills padding rows with zeros
    base = draw((x.shape[0], x.shape[1], columns))
    w, down = draw_weight((inner, columns)), draw_weight((width, rank))
    up, bias = draw_weight((rank, columns)), draw_weight((columns,))
    other = w.roll(1, dims=1).contiguous()
    tokens = x[:1, :most_rows]
    b1, w2, b2 = draw((rank,)), draw((rank, 1)), draw((1,))

    def matmul(y: Tensor, w: Tensor) -> Tensor:
        product: Tensor = irc.routed_matmul(y, given, w)
        return product

    def forecast_add(x: Tensor, *others: Tensor) -> Tensor:
        total: Tensor = irc.forecast_add(x, real, *others)
        return total

    matmul_magnitude = matmul(*_magnitudes(y, w))
    # The magnitude of a gate is at most about that of its two products, because silu is hardly steeper than 1.
    gate_magnitude = 2 * matmul_magnitude * matmul_magnitude.roll(1, dims=2)
    exact_y, exact_w, exact_other = _exact(y, w, other)
    router_inputs = (tokens, down, b1, w2, b2)
    forecast_inputs = (x, base, down, up, bias)
    return {
        "RoutedMatMul": Product([y, given, w], matmul(exact_y, exact_w), matmul_magnitude),
        "RoutedGate": Product(
            [y, given, w, other], irc.routed_gate(exact_y, given, exact_w, exact_other), gate_magnitude
        ),
        "Router": Product(
            list(router_inputs), irc.router(*_exact(*router_inputs)), irc.router(*_magnitudes(*router_inputs))
        ),
        "ForecastAdd": Product(
            [x, given, base, down, up, bias],
            forecast_add(*_exact(*forecast_inputs)),
            forecast_add(*_magnitudes(*forecast_inputs)),
        ),
    }


def _exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def _magnitudes(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double().abs() for tensor in tensors]
