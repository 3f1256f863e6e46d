"""Where the routers' decision threshold goes: between two tokens, never on one, and past groups of equal ones.

A unit early in the model reads little more than the token itself, so that all occurrences of a token have the
same logit difference there. A threshold on such a group would decide by rounding; one beside it can miss the
target by the group's whole share. Then the other units' thresholds make up for it.
"""

from __future__ import annotations

import torch

_EQUAL = 1e-5  # differences nearer than this (relative to their spread) are rounding


def choose_shifts(differences: dict[str, torch.Tensor], target: float, tolerance: float) -> dict[str, float]:
    """Return how far each unit's logit difference has to fall so that a share `target` lies under zero.

    All units fall by the same amount, unless a group of equal differences in one unit stands in the way.

    Args:
        differences: Execute minus approximate logit of every token, by unit.
        target: Share of all pairs to lie under zero.
        tolerance: Deviation at which units with a group of equal differences are set apart.
    """
    everything = torch.cat(list(differences.values()))
    common = quantile(everything, target)
    shifts = dict.fromkeys(differences, common)
    if abs((everything < common).double().mean().item() - target) <= tolerance:
        return shifts
    near = _spread(everything)
    least = tolerance * everything.numel()
    wall = _wall(everything, target)
    free = [unit for unit, values in differences.items() if int(((values - wall).abs() <= near).sum()) <= least]
    if free:
        rest = torch.cat([differences[unit] for unit in free])
        below = sum(int((differences[unit] < common).sum()) for unit in differences if unit not in free)
        other = quantile(rest, (target * everything.numel() - below) / rest.numel())
        shifts |= dict.fromkeys(free, other)
    return shifts


def quantile(values: torch.Tensor, share: float) -> float:
    """Return a threshold under which about `share` of the values lie, halfway between two of them.

    0 and 1 lie outside all values; a group of equal values lies whole on the side that comes nearer to the share.
    """
    ordered = values.sort().values
    count = len(ordered)
    cut = min(count, max(0, round(share * count)))
    if 0 < cut < count and ordered[cut] - ordered[cut - 1] <= _spread(ordered):
        near = _spread(ordered)
        low = int((ordered < ordered[cut] - near).sum())
        high = int((ordered <= ordered[cut] + near).sum())
        cut = low if cut - low <= high - cut else high
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
