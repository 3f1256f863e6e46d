"""Fields that earlier versions had: recipes that list them at their defaults are read, all others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from irc.recipe.refusals import Conflict, shown_value

_NO_EFFECT = "it made no difference (docs/results.md)"
_REMOVED: dict[str, tuple[Any, str]] = {
    "router.clip": (0.0, _NO_EFFECT),
    "router.noise_end": (1.0, _NO_EFFECT),
    "router.entropy_weight": (0.0, _NO_EFFECT),
    "router.target_range": ([], "store thresholds for several targets in a dial (docs/results.md)"),
    "router.budget": ("model", "give a target in flops for FLOPs; the others did much worse (docs/results.md)"),
}


def was_removed(name: str) -> bool:
    """Return whether an earlier version had a field, such as `router.clip`."""
    return name in _REMOVED


def without_removed(values: Any, finished: bool = False) -> Any:
    """Return a recipe's plain data without its removed fields.

    Args:
        values: The data.
        finished: Whether the recipe has been carried out, so that values other than the defaults do no harm.

    Raises:
        Conflict: One of them is not at its default.
    """
    for name, (default, reason) in _REMOVED.items():
        group, _, key = name.partition(".")
        below = values.get(group) if isinstance(values, Mapping) else None
        if not isinstance(below, Mapping) or key not in below:
            continue
        if not finished and below[key] != default:
            raise Conflict(
                f"{name} is {shown_value(below[key])}, but the field was removed: {reason}; leave it out", name
            )
        values = {**values, group: {other: value for other, value in below.items() if other != key}}
    return values
