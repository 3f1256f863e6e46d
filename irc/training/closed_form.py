"""Fits forecasters in closed form: one streaming pass for statistics, then a reduced-rank regression.

Nothing is stored per token. For each unit, the pass keeps weighted sums of x, y, x'x and x'y in float64.
The regression minimizes the squared error with each token weighted by 1 / |y|^2, so it fits the direction of every
token's output, which the cosine measures, rather than the few tokens of large norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from irc.model.modules import Forecaster
from irc.model.routed import RoutedForCausalLM
from passes.match import Unit

_EXACT_WIDTH = 1024  # up to this width the eigenvectors come from a full decomposition
_OVERSAMPLING, _ITERATIONS = 32, 12  # extra vectors and iterations of the subspace iteration


@dataclass
class UnitStatistics:
    """Weighted sums over the tokens of one unit of hidden size d, in float64.

    Attributes:
        width: Hidden size d.
        device: Device of the sums.
        weight: Sum of token weights.
        x: Sum of inputs [d].
        y: Sum of outputs [d].
        xx: Sum of x'x [d, d].
        xy: Sum of x'y [d, d].
        tokens: Number of tokens seen.
    """

    width: int
    device: torch.device | str = "cpu"
    weight: float = 0.0
    tokens: int = 0
    x: torch.Tensor = field(init=False)
    y: torch.Tensor = field(init=False)
    xx: torch.Tensor = field(init=False)
    xy: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        self.x, self.y = (torch.zeros(self.width, **options) for _ in range(2))
        self.xx, self.xy = (torch.zeros(self.width, self.width, **options) for _ in range(2))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add tokens.

        Args:
            x: Unit inputs [tokens, d].
            y: Unit outputs [tokens, d].
        """
        x, y = x.detach().float(), y.detach().float()
        weight = 1.0 / y.square().sum(-1, keepdim=True).clamp(min=1e-6)
        weighted = x * weight
        self.weight += weight.sum().item()
        self.tokens += x.shape[0]
        self.x += weighted.sum(0).double()
        self.y += (y * weight).sum(0).double()
        with torch.autocast(x.device.type, enabled=False):  # sums of thousands of tokens need more than bf16
            self.xx += (weighted.T @ x).double()
            self.xy += (weighted.T @ y).double()


def reduced_rank_regression(statistics: UnitStatistics, rank: int, ridge: float) -> tuple[torch.Tensor, ...]:
    """Find the best affine map of a given rank (Izenman 1975).

    The ridge regression is projected onto the leading eigenvectors of the covariance of its fitted outputs.

    Args:
        statistics: Sums of the streaming pass.
        rank: Rank of the map, at most d.
        ridge: Strength of the ridge, relative to the mean variance of the inputs.

    Returns:
        down [rank, d], up [d, rank] and bias [d], such that y ~ up @ down @ x + bias.
    """
    n = max(statistics.weight, 1e-30)
    mean_x, mean_y = statistics.x / n, statistics.y / n
    cov_xx = statistics.xx / n - torch.outer(mean_x, mean_x)
    cov_xy = statistics.xy / n - torch.outer(mean_x, mean_y)
    damping = ridge * cov_xx.diagonal().mean().clamp(min=1e-12)
    damped = cov_xx + damping * torch.eye(statistics.width, dtype=cov_xx.dtype, device=cov_xx.device)
    solution = torch.linalg.solve(damped, cov_xy)
    if statistics.width > _EXACT_WIDTH and rank + _OVERSAMPLING < statistics.width:

        def fitted_of(vectors: torch.Tensor) -> torch.Tensor:
            # Use cov_xx @ solution = cov_xy - damping * solution to avoid a product of two large matrices.
            product: torch.Tensor = solution.T @ (cov_xy @ vectors - damping * (solution @ vectors))
            return product

        up = leading_eigenvectors(fitted_of, statistics.width, rank, solution)
    else:
        fitted = solution.T @ cov_xx @ solution
        up = torch.linalg.eigh((fitted + fitted.T) / 2)[1][:, -rank:]
    down = (solution @ up).T
    return down, up, mean_y - up @ (down @ mean_x)


def leading_eigenvectors(
    product: Callable[[torch.Tensor], torch.Tensor], width: int, rank: int, like: torch.Tensor
) -> torch.Tensor:
    """Return the eigenvectors of the largest eigenvalues of a symmetric matrix, by subspace iteration.

    At a width of 4,096 a full decomposition takes half a minute on one core; this takes a fraction of that. Vectors of
    nearly equal eigenvalues may be rotated among themselves, which hardly changes the fit.

    Args:
        product: Multiplies the matrix, which is positive semi-definite, by a block of vectors [width, k].
        width: Width of the matrix.
        rank: Number of eigenvectors.
        like: A tensor with the data type and device of the result.

    Returns:
        [width, rank].
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(width, rank + _OVERSAMPLING, generator=generator, dtype=like.dtype).to(like.device)
    for _ in range(_ITERATIONS):
        vectors = torch.linalg.qr(product(vectors))[0]
    inner = vectors.T @ product(vectors)
    rotation = torch.linalg.eigh((inner + inner.T) / 2)[1]
    leading: torch.Tensor = vectors @ rotation[:, -rank:]
    return leading


def set_closed_form(forecaster: Forecaster, statistics: UnitStatistics, rank: int, ridge: float) -> None:
    """Write the closed-form solution into a forecaster.

    A `silu` forecaster starts in the nearly linear range of SiLU: with a bottleneck bias of 6, silu(h + 6) ~ h + 6.

    Args:
        forecaster: Changed in place.
        statistics: Sums of the streaming pass over its unit.
        rank: Rank of the forecaster.
        ridge: Strength of the ridge, relative to the mean variance of the inputs.
    """
    down, up, bias = reduced_rank_regression(statistics, rank, ridge)
    shift = 0.0
    if isinstance(forecaster.act, nn.SiLU):
        scale = (down @ (statistics.xx / statistics.weight) @ down.T).diagonal().sqrt().max().clamp(min=1e-12)
        down, up = down * (2.0 / scale), up * (scale / 2.0)
        shift = 6.0
    with torch.no_grad():
        forecaster.down.weight.copy_(down)
        forecaster.down.bias.fill_(shift)
        forecaster.up.weight.copy_(up)
        forecaster.up.bias.copy_(bias - up @ torch.full((rank,), shift, dtype=up.dtype, device=up.device))


@contextmanager
def gather_statistics(
    model: RoutedForCausalLM, keep: torch.Tensor | None = None, units: Sequence[Unit] | None = None
) -> Iterator[dict[str, UnitStatistics]]:
    """Gather statistics of units from all forward calls inside the `with` block.

    Args:
        model: Rewritten model.
        keep: bool [batch, tokens], true for real tokens; no padding if None.
        units: The units; all of the model if None.

    Yields:
        The statistics by unit name; they grow with each forward call.
    """
    units = model.units if units is None else units
    statistics = {unit.name: UnitStatistics(unit.width, model.device) for unit in units}
    inputs: dict[str, torch.Tensor] = {}
    handles = []
    for unit in units:
        handles.append(model.part(unit, "forecaster").register_forward_pre_hook(_remember(unit, inputs)))
        handles.append(model.part(unit, "mux").register_forward_pre_hook(_accumulate(unit, inputs, statistics, keep)))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _remember(unit: Unit, inputs: dict[str, torch.Tensor]) -> Any:
    def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs[unit.name] = arguments[0]

    return hook


def _accumulate(
    unit: Unit, inputs: dict[str, torch.Tensor], statistics: dict[str, UnitStatistics], keep: torch.Tensor | None
) -> Any:
    def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x, y = inputs.pop(unit.name), arguments[0]
        if keep is None:
            statistics[unit.name].add(x.flatten(0, -2), y.flatten(0, -2))
        else:
            statistics[unit.name].add(x[keep], y[keep])

    return hook
