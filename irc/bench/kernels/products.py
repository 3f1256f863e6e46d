"""What the kernels of products are held against: exact sums, and how far a type may be from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from passes import dialect  # noqa: F401 - registers the operators

PRODUCTS = ("RoutedMatMul", "RoutedGate", "Router", "ForecastAdd")
# Of the sum of the terms' magnitudes. Kernels round once to four times.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Product:
    """Inputs of an operator, and what it should make of them.

    Attributes:
        inputs: In the operator's order.
        exact: Its output in float64, but for a float32 one.
        magnitude: The same of all inputs' magnitudes: what rounding errors are measured by.
    """

    inputs: list[Tensor]
    exact: Tensor
    magnitude: Tensor

    @property
    def kind(self) -> torch.dtype:
        """The output's type."""
        return self.inputs[0].dtype if self.exact.dtype == torch.float64 else self.exact.dtype

    def is_near(self, found: Tensor) -> bool:
        """Return whether an output is right up to rounding; NaN where it should be, and nowhere else."""
        if found.shape != self.exact.shape or found.dtype != self.kind:
            return False
        wrong = (found.double() - self.exact).abs() > TOLERANCES[self.inputs[0].dtype] * self.magnitude
        return bool((found.isnan() == self.exact.isnan()).all() and not wrong.any())


def draw_products(x: Tensor, rows: Tensor, generator: torch.Generator, padded: bool) -> dict[str, Product]:
    """Draw one product for each operator: few or many rows, of one or several parts, of any number of columns.

    Args:
        x: [batch, tokens, d].
        rows: Of x.
        generator: Draws sizes and weights.
        padded: Whether rows (-1, -1) follow, which only CUDA kernels take.
    """
    irc = torch.ops.irc
    most = _choice(generator, 1, 3, 8, 40)
    real = rows[:, :most]
    none = torch.full((1, _choice(generator, 0, 1, 5) if padded else 0, 2), -1)
    given = torch.cat((real, none), 1)
    depth, columns = x.shape[2], _choice(generator, 8, 24, 36, 130, 7, 264)
    rank, deep = _choice(generator, 3, 4, 16), _choice(generator, depth, 700)
    y = torch.randn((1, given.shape[1], deep), generator=generator).to(x.dtype)
    y[:, real.shape[1] :] = 0  # as Compact gathers them
    base = torch.randn((*x.shape[:2], columns), generator=generator).to(x.dtype)
    w, down, up, bias = (
        (torch.randn(shape, generator=generator) / shape[0] ** 0.5).to(x.dtype)
        for shape in ((deep, columns), (depth, rank), (rank, columns), (columns,))
    )
    y_exact, y_magnitude = (irc.routed_matmul(a, given, b) for a, b in _exact_and_magnitude(y, w))
    z_exact, z_magnitude = (
        irc.forecast_add(a, real, *others) for a, *others in _exact_and_magnitude(x, base, down, up, bias)
    )
    other = w.roll(1, dims=1).contiguous()
    gate_exact, _ = (irc.routed_gate(a, given, b, c) for a, b, c in _exact_and_magnitude(y, w, other))
    gate_magnitude = 2 * y_magnitude * y_magnitude.roll(1, dims=2)  # silu is hardly steeper than 1
    tokens = x[:1, :most]
    w1, b1, w2, b2 = down, *(torch.randn(n, generator=generator).to(x.dtype) for n in ((rank,), (rank, 1), (1,)))
    score, score_magnitude = (irc.router(*each) for each in _exact_and_magnitude(tokens, w1, b1, w2, b2))
    return {
        "RoutedMatMul": Product([y, given, w], y_exact, y_magnitude),
        "RoutedGate": Product([y, given, w, other], gate_exact, gate_magnitude),
        "Router": Product([tokens, w1, b1, w2, b2], score, score_magnitude),
        "ForecastAdd": Product([x, given, base, down, up, bias], z_exact, z_magnitude),
    }


def _exact_and_magnitude(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return [tensor.double() for tensor in tensors], [tensor.double().abs() for tensor in tensors]


def _choice(generator: torch.Generator, *values: int) -> int:
    return values[int(torch.randint(0, len(values), (), generator=generator))]
