"""Defines what must meet the target: the share of skipped pairs, the FLOPs of the model, or each unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import reduce

from irc.errors import InputError, IrcError
from irc.model.flops import FlopsRange, flops_range
from irc.model.modules import Record
from irc.model.routed import RoutedForCausalLM
from irc.recipe.target import TargetKind

_MAX_SHARE = 0.95  # largest share of its tokens that `allocate_shares` lets a unit skip
_BATCH = 16


@dataclass(frozen=True)
class Budget:
    """How much to skip, and in which units.

    Attributes:
        sparsity: Target share of (token, unit) pairs to approximate.
        weights: Weight of each unit in that share; the weights sum to 1.
        targets: Share of its tokens that each unit should skip, or None if only the model as a whole has a target.
        flops: If the target is a FLOPs ratio, the ratios that the model can have. `sparsity` is then the share to
            remove of what can be removed, and the weights are the units' parts in that.
    """

    sparsity: float
    weights: dict[str, float]
    targets: dict[str, float] | None = None
    flops: FlopsRange | None = None

    @property
    def kind(self) -> TargetKind:
        """What the target is a value of."""
        return "sparsity" if self.flops is None else "flops"

    def share(self, target: float) -> float:
        """Return the share to skip, as `sparsity` counts it, for another target."""
        return target if self.flops is None else self.flops.share(target)

    def value(self, share: float) -> float:
        """Return what a share, as `sparsity` counts it, means in terms of the target: the inverse of `share`."""
        return share if self.flops is None else self.flops.ratio(share)

    def loss(self, execution: Mapping[str, torch.Tensor], sparsity: float) -> torch.Tensor:
        """Return the mean distance between the executed and the target shares.

        The distance is that of all processes together. Its gradient is the part that this process contributes.

        Args:
            execution: Mean execution of each unit, scalars that carry the routers' gradient.
            sparsity: Target share of this step.

        Returns:
            A scalar.
        """
        if self.targets is None:
            executed = sum((self.weights[unit] * mean for unit, mean in execution.items()), torch.zeros(())).reshape(1)
            wanted = executed.new_tensor([1 - sparsity])
        else:
            executed = torch.stack(list(execution.values()))
            wanted = executed.new_tensor([1 - self.targets[unit] for unit in execution])
        gap = reduce(executed.detach().clone(), "mean") - wanted
        distance: torch.Tensor = (gap.sign() * (executed - executed.detach()) + gap.abs()).mean()
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

    def distance(self, skipped: Mapping[str, float]) -> float:
        """Return the mean distance of the skipped shares from their targets."""
        if self.targets is None:
            return abs(self.realized(skipped) - self.sparsity)
        return sum(abs(share - self.targets[unit]) for unit, share in skipped.items()) / len(skipped)


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


def make_budget(model: RoutedForCausalLM, kind: str, sparsity: float, text: torch.Tensor) -> Budget:
    """Return the budget of a target sparsity.

    Args:
        model: Rewritten model with fitted forecasters.
        kind: `model`, `flops`, `unit` or `recoverability`.
        sparsity: Target share.
        text: Calibration windows, int64 [windows, length].
    """
    plain = plain_budget([unit.name for unit in model.units], sparsity)
    if kind == "model":
        return plain
    if kind == "unit":
        return Budget(sparsity, plain.weights, dict.fromkeys(plain.weights, sparsity))
    if kind == "flops":
        return Budget(sparsity, flops_range(model, text.shape[1]).weights)
    if kind == "recoverability":
        merits = {name: 1 / max(1 - cosine, 1e-3) for name, cosine in _recoverability(model, text).items()}
        return Budget(sparsity, plain.weights, allocate_shares(merits, sparsity))
    raise IrcError(f"unknown router.budget '{kind}'; this is a bug in irc, please report it")


def allocate_shares(merits: Mapping[str, float], mean: float) -> dict[str, float]:
    """Return a share for each unit in proportion to its merit, at most 0.95 each.

    Args:
        merits: Merit of each unit, above 0.
        mean: Mean of the returned shares. A mean above 0.95 raises the limit to itself.
    """
    limit = max(_MAX_SHARE, mean)
    shares: dict[str, float] = {}
    while len(shares) < len(merits):
        open_merits = {name: merit for name, merit in merits.items() if name not in shares}
        left = mean * len(merits) - sum(shares.values())
        scale = left / sum(open_merits.values())
        at_limit = [name for name, merit in open_merits.items() if merit * scale > limit]
        if at_limit:
            shares |= dict.fromkeys(at_limit, limit)
        else:
            shares |= {name: merit * scale for name, merit in open_merits.items()}
    return {name: shares[name] for name in merits}


@torch.no_grad()
def _recoverability(model: RoutedForCausalLM, text: torch.Tensor) -> dict[str, float]:
    """Return the mean cosine between each unit's output and its forecast while every unit is executed."""
    total = dict.fromkeys((unit.name for unit in model.units), 0.0)
    for batch in text.split(_BATCH):
        tape: dict[str, Record] = {}
        with model.control.using(mode="execute", tape=tape, measure_error=True):
            model.states(batch.to(model.device))
        for name, record in tape.items():
            assert record.cosine is not None
            total[name] += record.cosine.sum().item()
    return {name: value / text.numel() for name, value in total.items()}
