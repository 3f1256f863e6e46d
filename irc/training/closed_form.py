"""Forecasters in closed form: one streaming pass of sufficient statistics, then reduced-rank regression.

Nothing is stored per token. Per unit the pass keeps weighted sums of x, y, x'x and x'y in float64.
The regression minimises the squared error with every token weighted by 1 / |y|^2, so that it fits the
direction of each token's output (what the cosine measures) rather than the few tokens of large norm.
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

_EXACT = 1024  # widths up to here are decomposed in full
_BESIDE, _ITERATIONS = 32, 12


@dataclass
class UnitStatistics:
    """Weighted sums over tokens for one unit of hidden size d, float64.

    Attributes:
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
        self.xx += (weighted.T @ x).double()
        self.xy += (weighted.T @ y).double()


def reduced_rank_regression(statistics: UnitStatistics, rank: int, ridge: float) -> tuple[torch.Tensor, ...]:
    """Solve for the best affine map of a rank (Izenman 1975).

    A ridge regression is fitted, then projected on the top eigenvectors of its fitted outputs' covariance.

    Args:
        statistics: Sums of the streaming pass.
        rank: Rank of the map, at most d.
        ridge: Relative to the mean input variance.

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
    if statistics.width > _EXACT and rank + _BESIDE < statistics.width:

        def fitted_of(vectors: torch.Tensor) -> torch.Tensor:
            # cov_xx @ solution is cov_xy - damping * solution: no product of two large matrices.
            product: torch.Tensor = solution.T @ (cov_xy @ vectors - damping * (solution @ vectors))
            return product

        up = leading_vectors(fitted_of, statistics.width, rank, solution)
    else:
        fitted = solution.T @ cov_xx @ solution
        up = torch.linalg.eigh((fitted + fitted.T) / 2)[1][:, -rank:]
    down = (solution @ up).T
    return down, up, mean_y - up @ (down @ mean_x)


def leading_vectors(
    product: Callable[[torch.Tensor], torch.Tensor], width: int, rank: int, like: torch.Tensor
) -> torch.Tensor:
    """Return the eigenvectors of a symmetric matrix's largest eigenvalues by subspace iteration [width, rank].

    A full decomposition takes half a minute on one core at a width of 4,096, this a fraction of it. What it finds may
    be turned within nearly equal eigenvalues, which costs the fit nothing to speak of.

    Args:
        product: The matrix times a block of vectors [width, k].
        width: Of the matrix, positive semi-definite.
        rank: How many.
        like: Has the data type and device.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(width, rank + _BESIDE, generator=generator, dtype=like.dtype).to(like.device)
    for _ in range(_ITERATIONS):
        vectors = torch.linalg.qr(product(vectors))[0]
    inner = vectors.T @ product(vectors)
    turned = torch.linalg.eigh((inner + inner.T) / 2)[1]
    found: torch.Tensor = vectors @ turned[:, -rank:]
    return found


def set_closed_form(forecaster: Forecaster, statistics: UnitStatistics, rank: int, ridge: float) -> None:
    """Write the closed-form solution into a forecaster.

    A `silu` forecaster starts in SiLU's nearly linear range: a bottleneck bias of 6 makes silu(h + 6) ~ h + 6.
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
def gathering(
    model: RoutedForCausalLM, keep: torch.Tensor | None = None, units: Sequence[Unit] | None = None
) -> Iterator[dict[str, UnitStatistics]]:
    """Gather statistics of units from all forward calls inside the `with` block.

    Args:
        model: Rewritten model.
        keep: bool [batch, tokens] of real tokens; all are real when None.
        units: Of which; all when None.
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
