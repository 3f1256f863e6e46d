"""Chooses the routers' decision thresholds so that none falls on a group of equal logit differences.

A unit early in the model reads little more than the token itself, so all occurrences of a token have the same logit
difference there. A threshold on such a group would decide by rounding. A threshold next to it can miss the target by
the share of the whole group; the thresholds of the other units then compensate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

_EQUAL = 1e-5  # values that differ by less than this times their standard deviation count as equal


def choose_shifts(
    differences: Mapping[str, torch.Tensor], target: float, tolerance: float, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return how much to lower each unit's logit difference so that a share `target` of the pairs is below zero.

    All units are lowered by the same amount, unless one of them has a group of equal differences at the threshold.

    Args:
        differences: Execute logit minus approximate logit of each token, [tokens] by unit.
        target: Share of all pairs that should be below zero.
        tolerance: Deviation from the target at which units with a group of equal differences are treated separately.
        weights: Weight of each unit, summing to 1; equal weights if None.
    """
    weight = weights or dict.fromkeys(differences, 1 / len(differences))
    common = common_threshold(differences, target, weight)
    shifts = dict.fromkeys(differences, common)
    if abs(share_below(differences, shifts, weight) - target) <= tolerance:
        return shifts
    all_values = torch.cat(list(differences.values()))
    equal, at_target = equal_distance(all_values), _value_at(all_values, target, _mass_of(differences, weight))
    without_group = {
        unit: values
        for unit, values in differences.items()
        if weight[unit] * ((values - at_target).abs() <= equal).double().mean().item() <= tolerance
    }
    if without_group:
        others = {unit: values for unit, values in differences.items() if unit not in without_group}
        reached = share_below(others, shifts, weight)
        remaining = (target - reached) / sum(weight[unit] for unit in without_group)
        shifts |= dict.fromkeys(without_group, common_threshold(without_group, remaining, weight))
    return shifts


def share_below(
    differences: Mapping[str, torch.Tensor], limits: Mapping[str, float], weights: Mapping[str, float]
) -> float:
    """Return the share of all pairs below the limit of their unit, each unit counting by its weight."""
    shares = {unit: (values < limits[unit]).double().mean().item() for unit, values in differences.items()}
    return sum(weights[unit] * share for unit, share in shares.items())


def log_odds(share: float) -> float:
    """Return log(share / (1 - share)), with the share kept within 1e-4 of 0 and 1, so that it is finite."""
    share = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(share / (1 - share))


def common_threshold(differences: Mapping[str, torch.Tensor], share: float, weights: Mapping[str, float]) -> float:
    """Return the threshold for all units below which a share of their pairs is.

    Args:
        differences: Execute logit minus approximate logit of each token, [tokens] by unit.
        share: Share of all pairs, each unit counting by its weight.
        weights: Weight of each unit.
    """
    return quantile(torch.cat(list(differences.values())), share, _mass_of(differences, weights))


def _mass_of(differences: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    return torch.cat([torch.full((len(v),), weights[unit] / len(v)).double() for unit, v in differences.items()])


def quantile(values: torch.Tensor, share: float, mass: torch.Tensor | None = None) -> float:
    """Return a threshold below which about `share` of the values are, halfway between two of them.

    Shares of 0 and 1 give thresholds outside of all values. A group of equal values stays together, on the side that
    comes nearer to the share.

    Args:
        values: [n], in any order.
        share: Share of the total mass, 0 to 1.
        mass: Weight of each value, float64 [n]; equal weights if None.
    """
    ordered, order = values.sort()
    count = len(ordered)
    mass = torch.ones(count, dtype=torch.float64) if mass is None else mass[order]
    below = _mass_below(mass)
    cut = int((below - share).abs().argmin())
    equal = equal_distance(ordered)
    if 0 < cut < count and ordered[cut] - ordered[cut - 1] <= equal:
        low = int((ordered < ordered[cut] - equal).sum())
        high = int((ordered <= ordered[cut] + equal).sum())
        cut = low if (below[low] - share).abs() <= (below[high] - share).abs() else high
    if cut == 0:
        return ordered[0].item() - 1.0
    if cut == count:
        return ordered[-1].item() + 1.0
    return (ordered[cut - 1].item() + ordered[cut].item()) / 2


def _value_at(values: torch.Tensor, share: float, mass: torch.Tensor) -> torch.Tensor:
    """Return the value below which a share of the total mass is."""
    ordered, order = values.sort()
    return ordered[int((_mass_below(mass[order])[:-1] - share).abs().argmin())]


def _mass_below(mass: torch.Tensor) -> torch.Tensor:
    """Return the share of the total mass that is below each possible cut of the sorted values, [n + 1]."""
    return torch.cat([mass.new_zeros(1), mass.cumsum(0) / mass.sum()])


def equal_distance(values: torch.Tensor) -> float:
    """Return the distance up to which two of the values count as equal."""
    return _EQUAL * (values.std().item() if len(values) > 1 else 1.0)
