"""The sparsity dial: one trained bundle, run at any sparsity between those whose thresholds it keeps."""

from __future__ import annotations

import copy
import numbers
from typing import Any, cast

import torch

from irc.errors import InputError
from irc.model.modules import Router
from irc.model.routed import RoutedForCausalLM


def turn_dial(model: RoutedForCausalLM, sparsity: float) -> None:
    """Set a bundle's thresholds for another sparsity, between two that it keeps by interpolation; again, if wanted.

    Args:
        model: Of a bundle, as `irc.load` returns it.
        sparsity: Share of (token, unit) pairs to approximate.

    Raises:
        InputError: The bundle keeps no other thresholds, or none on both sides of this sparsity.
    """
    points = dial_round(model, sparsity)
    shift, keep = (_between(points, sparsity, key) for key in ("shift", "keep"))
    routers = {unit.name: cast(Router, model.part(unit, "router")) for unit in model.units}
    own = model.facts.setdefault("own_thresholds", {n: r.last.bias.detach().clone() for n, r in routers.items()})
    with torch.no_grad():
        for name, router in routers.items():
            router.last.bias.copy_(own[name])
            router.shift(shift[name])
    config = copy.deepcopy(model.facts["config"])
    config["sparsity"] = {"target": sparsity}
    for entry in config["units"]:
        entry["calibration_keep"] = keep[entry["name"]]
        entry["keep_ratio"] = None  # measured at the bundle's own sparsity
    model.facts["config"] = config
    model.facts["dial"] = sparsity


def dial_round(model: RoutedForCausalLM, sparsity: float) -> list[dict[str, Any]]:
    """Return the points of a bundle's dial.

    Raises:
        InputError: It has none, or none on both sides of this sparsity.
    """
    points: list[dict[str, Any]] = model.facts.get("config", {}).get("dial") or []
    where = model.facts.get("bundle", "the bundle")
    if not points:
        raise InputError(
            f"{where}: it keeps thresholds for its own sparsity alone; convert with --dial 0.1,0.2,0.3,0.4,0.5,0.6"
        )
    low, high = points[0]["sparsity"], points[-1]["sparsity"]
    if not isinstance(sparsity, numbers.Real):
        raise InputError(f"{where}: sparsity {sparsity!r} is no number; give one from {low:g} to {high:g}")
    if not low <= sparsity <= high:
        raise InputError(f"{where}: sparsity {sparsity:g} is outside its dial, which goes from {low:g} to {high:g}")
    return points


def _between(points: list[dict[str, Any]], sparsity: float, key: str) -> dict[str, float]:
    """Interpolate the units' values between the two neighbouring points."""
    above = next(index for index, point in enumerate(points) if point["sparsity"] >= sparsity)
    right = points[above]
    left = points[above - 1] if above else right
    span = right["sparsity"] - left["sparsity"]
    share = (sparsity - left["sparsity"]) / span if span else 0.0
    return {unit: (1 - share) * left[key][unit] + share * value for unit, value in right[key].items()}
