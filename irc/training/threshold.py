"""Where the routers' decision threshold goes: between two tokens, never on one, and past groups of equal ones.

A unit early in the model reads little more than the token itself, so that all occurrences of a token have the
same logit difference there. A threshold on such a group would decide by rounding; one beside it can miss the
target by the group's whole share. Then the other units' thresholds make up for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_EQUAL = 1e-5  # differences nearer than this (relative to their spread) are rounding


def choose_shifts(
    differences: Mapping[str, torch.Tensor], target: float, tolerance: float, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return how far each unit's logit difference has to fall so that a share `target` lies under zero.

    All units fall by the same amount, unless a group of equal differences in one unit stands in the way.

    Args:
        differences: Execute minus approximate logit of every token, by unit.
        target: Share of all pairs to lie under zero.
        tolerance: Deviation at which units with a group of equal differences are set apart.
        weights: What a unit counts, summing to 1; equal when None.
    """
    weight = weights or dict.fromkeys(differences, 1 / len(differences))

    def threshold(units: Mapping[str, torch.Tensor], share: float) -> float:
        mass = [torch.full((len(values),), weight[unit] / len(values)).double() for unit, values in units.items()]
        return quantile(torch.cat(list(units.values())), share, torch.cat(mass))

    def below(unit: str, limit: float) -> float:
        return weight[unit] * (differences[unit] < limit).double().mean().item()

    common = threshold(differences, target)
    shifts = dict.fromkeys(differences, common)
    if abs(sum(below(unit, common) for unit in differences) - target) <= tolerance:
        return shifts
    everything = torch.cat(list(differences.values()))
    near, wall = _spread(everything), _wall(everything, target)
    free = {
        unit: values
        for unit, values in differences.items()
        if weight[unit] * ((values - wall).abs() <= near).double().mean().item() <= tolerance
    }
    if free:
        taken = sum(below(unit, common) for unit in differences if unit not in free)
        shifts |= dict.fromkeys(free, threshold(free, (target - taken) / sum(weight[unit] for unit in free)))
    return shifts


def quantile(values: torch.Tensor, share: float, mass: torch.Tensor | None = None) -> float:
    """Return a threshold under which about `share` of the values lie, halfway between two of them.

    0 and 1 lie outside all values; a group of equal values lies whole on the side that comes nearer to the share.

    Args:
        values: [n], in any order.
        share: Of their mass.
        mass: What each counts, [n] float64; equal when None.
    """
    ordered, order = values.sort()
    count = len(ordered)
    mass = torch.ones(count, dtype=torch.float64) if mass is None else mass[order]
    under = torch.cat([mass.new_zeros(1), mass.cumsum(0) / mass.sum()])  # the share under each place for a cut
    cut = int((under - share).abs().argmin())
    if 0 < cut < count and ordered[cut] - ordered[cut - 1] <= _spread(ordered):
        near = _spread(ordered)
        low = int((ordered < ordered[cut] - near).sum())
        high = int((ordered <= ordered[cut] + near).sum())
        cut = low if (under[low] - share).abs() <= (under[high] - share).abs() else high
    if cut == 0:
        return ordered[0].item() - 1.0
    if cut == count:
        return ordered[-1].item() + 1.0
    return (ordered[cut - 1].item() + ordered[cut].item()) / 2


def _wall(values: torch.Tensor, share: float) -> torch.Tensor:
    ordered = values.sort().values
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered))))]


def _spread(values: torch.Tensor) -> float:
    return _EQUAL * (values.std().item() if len(values) > 1 else 1.0)
