"""Defines what must meet the target: the share of skipped pairs, or the FLOPs of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import reduce

from irc.errors import InputError
from irc.model.flops import FlopsRange
from irc.recipe.target import TargetKind


@dataclass(frozen=True)
class Budget:
    """How much to skip, and in which units.

    Attributes:
        sparsity: Target share of (token, unit) pairs to approximate.
        weights: Weight of each unit in that share; the weights sum to 1.
        flops: If the target is a FLOPs ratio, the ratios that the model can have. `sparsity` is then the share to
            remove of what can be removed, and the weights are the units' parts in that.
    """

    sparsity: float
    weights: dict[str, float]
    flops: FlopsRange | None = None

    @property
    def kind(self) -> TargetKind:
        """What the target is a value of."""
        return "sparsity" if self.flops is None else "flops"

    def value(self, share: float) -> float:
        """Return what a share, as `sparsity` counts it, means in terms of the target."""
        return share if self.flops is None else self.flops.ratio(share)

    def loss(self, execution: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the distance between the executed share and the target's.

        The distance is that of all processes together. Its gradient is the part that this process contributes.

        Args:
            execution: Mean execution of each unit, scalars that carry the routers' gradient.

        Returns:
            A scalar.
        """
        executed = self.cost(execution)
        gap = reduce(executed.detach().clone(), "mean") - (1 - self.sparsity)
        distance: torch.Tensor = gap.sign() * (executed - executed.detach()) + gap.abs()
        return distance

    def cost(self, execution: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the share of the model that is executed, as the target counts it; a scalar.

        Args:
            execution: Mean execution of each unit.
        """
        return torch.stack([self.weights[unit] * mean for unit, mean in execution.items()]).sum()

    def realized(self, skipped: Mapping[str, float]) -> float:
        """Return the model's skipped share as the target counts it, from the share that each unit skips."""
        return sum(self.weights[unit] * share for unit, share in skipped.items())


def plain_budget(units: list[str], sparsity: float) -> Budget:
    """Return the budget in which all (token, unit) pairs count equally."""
    return Budget(sparsity, dict.fromkeys(units, 1 / len(units)))


def flops_budget(found: FlopsRange, ratio: float) -> Budget:
    """Return the budget of a FLOPs ratio, routed over dense.

    Raises:
        InputError: The model cannot reach the ratio.
    """
    if not found.least <= ratio < 1:
        raise InputError(
            f"flops {ratio:g} cannot be reached: with this model, policy, rank and window, the ratio is at least "
            f"{found.least:.3f} (everything skipped) and less than 1 (nothing saved); give a value in between",
            options=("flops", "dial"),
        )
    return Budget(found.share(ratio), found.weights, flops=found)
