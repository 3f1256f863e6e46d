"""The dial: runs one trained bundle at any sparsity, or FLOPs ratio, between those whose thresholds it holds."""

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
from irc.recipe.target import Target, value_of


def turn_dial(model: RoutedForCausalLM, target: Target) -> None:
    """Set a bundle's thresholds for another target, interpolated between the two nearest that it holds.

    The dial can be turned any number of times; every turn starts from the bundle's own thresholds.

    Args:
        model: A bundle's, as `irc.load` returns it.
        target: What to reach.

    Raises:
        InputError: The bundle has no dial, or the target is outside it or of another kind.
    """
    bundle = check_dial(model, target)
    points = bundle.config.dial
    shift = _interpolated(points, target.value, lambda point: point.shift)
    keep = _interpolated(points, target.value, lambda point: point.keep)
    routers = {unit.name: cast(Router, model.part(unit, "router")) for unit in model.units}
    own = bundle.own_thresholds or {name: router.last.bias.detach().clone() for name, router in routers.items()}
    with torch.no_grad():
        for name, router in routers.items():
            router.last.bias.copy_(own[name])
            router.shift(shift[name])
    # Keep ratio and recoverability were measured at the bundle's own target; the forecasters are the same.
    units = {
        name: UnitFigures(calibration_keep=keep[name], recoverability=unit.recoverability)
        for name, unit in bundle.config.measured.units.items()
    }
    shares = SparsityFigures(target=value_of(target, "sparsity"))
    measured = replace(bundle.config.measured, units=units, sparsity=shares, target=target)
    config = replace(bundle.config, measured=measured)
    model.bundle = replace(bundle, config=config, turned_to=target, own_thresholds=own)


def check_dial(model: RoutedForCausalLM, target: Target) -> Bundle:
    """Return the bundle of a model, whose dial reaches a target.

    Args:
        model: Rewritten model.
        target: What to reach.

    Raises:
        InputError: There is no dial, or the target is outside it or of another kind.
    """
    bundle = bundle_of(model)
    if bundle is None or not bundle.config.dial:
        where = "the model" if bundle is None else bundle.folder
        raise InputError(
            f"{where}: holds thresholds for its own target only; convert with a dial such as 0.1,0.2,0.3,0.4,0.5",
            options=("dial",),
        )
    (kind, low), (_, high) = bundle.config.dial[0].target, bundle.config.dial[-1].target
    if not isinstance(target.value, numbers.Real):
        raise InputError(f"{bundle.folder}: {kind} {target.value!r} is not a number; give one from {low:g} to {high:g}")
    if target.kind != kind:
        raise InputError(
            f"{bundle.folder}: its dial is of {kind}, not of {target.kind}; give {kind} from {low:g} to {high:g}",
            options=(kind,),
        )
    if not low <= target.value <= high:
        raise InputError(f"{bundle.folder}: {target} is outside its dial; give one from {low:g} to {high:g}")
    return bundle


def _interpolated(
    points: Sequence[DialPoint], value: float, values: Callable[[DialPoint], Mapping[str, float]]
) -> dict[str, float]:
    """Return the units' values between the two points that are the neighbours of a target's value."""
    above = next(index for index, point in enumerate(points) if point.target.value >= value)
    right = points[above]
    left = points[above - 1] if above else right
    span = right.target.value - left.target.value
    share = (value - left.target.value) / span if span else 0.0
    return {unit: (1 - share) * values(left)[unit] + share * each for unit, each in values(right).items()}
