"""The sparsity dial: runs one trained bundle at any sparsity between those whose thresholds it holds."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch

from irc.bundle.config import DialPoint, SparsityFigures, UnitFigures
from irc.bundle.contents import Bundle, bundle_of
from irc.errors import InputError
from irc.model.modules import Router
from irc.model.routed import RoutedForCausalLM


def turn_dial(model: RoutedForCausalLM, sparsity: float) -> None:
    """Set a bundle's thresholds for another sparsity, interpolated between the two nearest that it holds.

    The dial can be turned any number of times; every turn starts from the bundle's own thresholds.

    Args:
        model: A bundle's, as `irc.load` returns it.
        sparsity: Share of (token, unit) pairs to approximate.

    Raises:
        InputError: The bundle has no dial, or the sparsity is outside it.
    """
    bundle = check_dial(model, sparsity)
    points = bundle.config.dial
    shift = _interpolated(points, sparsity, lambda point: point.shift)
    keep = _interpolated(points, sparsity, lambda point: point.keep)
    routers = {unit.name: cast(Router, model.part(unit, "router")) for unit in model.units}
    own = bundle.own_thresholds or {name: router.last.bias.detach().clone() for name, router in routers.items()}
    with torch.no_grad():
        for name, router in routers.items():
            router.last.bias.copy_(own[name])
            router.shift(shift[name])
    # Keep ratio and recoverability were measured at the bundle's own sparsity; the forecasters are the same.
    units = {
        name: UnitFigures(calibration_keep=keep[name], recoverability=unit.recoverability)
        for name, unit in bundle.config.measured.units.items()
    }
    measured = replace(bundle.config.measured, units=units, sparsity=SparsityFigures(target=sparsity))
    config = replace(bundle.config, measured=measured)
    model.bundle = replace(bundle, config=config, turned_to=sparsity, own_thresholds=own)


def check_dial(model: RoutedForCausalLM, sparsity: float) -> Bundle:
    """Return the bundle of a model, whose dial reaches a sparsity.

    Args:
        model: Rewritten model.
        sparsity: Share of (token, unit) pairs to approximate.

    Raises:
        InputError: There is no dial, or the sparsity is outside it.
    """
    bundle = bundle_of(model)
    if bundle is None or not bundle.config.dial:
        where = "the model" if bundle is None else bundle.folder
        raise InputError(
            f"{where}: holds thresholds for its own sparsity only; convert with a dial such as 0.1,0.2,0.3,0.4,0.5",
            options=("dial",),
        )
    low, high = bundle.config.dial[0].sparsity, bundle.config.dial[-1].sparsity
    if not isinstance(sparsity, numbers.Real):
        raise InputError(f"{bundle.folder}: sparsity {sparsity!r} is not a number; give one from {low:g} to {high:g}")
    if not low <= sparsity <= high:
        raise InputError(
            f"{bundle.folder}: sparsity {sparsity:g} is outside its dial; give one from {low:g} to {high:g}"
        )
    return bundle


def _interpolated(
    points: Sequence[DialPoint], sparsity: float, values: Callable[[DialPoint], Mapping[str, float]]
) -> dict[str, float]:
    """Return the units' values between the two neighbouring points."""
    above = next(index for index, point in enumerate(points) if point.sparsity >= sparsity)
    right = points[above]
    left = points[above - 1] if above else right
    span = right.sparsity - left.sparsity
    share = (sparsity - left.sparsity) / span if span else 0.0
    return {unit: (1 - share) * values(left)[unit] + share * value for unit, value in values(right).items()}
