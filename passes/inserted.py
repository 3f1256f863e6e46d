"""What inserted modules say about themselves, so that lowering knows which operator each of them becomes.

A router or forecaster states its form in an attribute `form`. One without a form is called as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

EXECUTE, APPROXIMATE = 0, 1
"""Positions of a router's two logits."""


@dataclass(frozen=True)
class RouterForm:
    """A router that computes `last(relu(first(x)))`; both linears have a bias, and `last` makes two logits.

    Attributes:
        first: Name of the first linear in the router.
        last: Name of the last linear in the router.
        of_bottleneck: Whether x is the bottleneck of the unit's forecaster and not what the router is called with.
    """

    first: str
    last: str
    of_bottleneck: bool = False


@dataclass(frozen=True)
class ForecasterForm:
    """A forecaster that computes `up(activation(down(x)))`; both linears have a bias.

    Attributes:
        down: Name of the linear that makes the bottleneck.
        activation: Name of the activation.
        up: Name of the linear that makes the forecast.
        is_linear: Whether the activation changes nothing.
    """

    down: str
    activation: str
    up: str
    is_linear: bool


@dataclass(frozen=True)
class ZeroForm:
    """A forecaster that returns zeros: a skipped unit adds nothing to the residual stream."""


def router_form(module: nn.Module) -> RouterForm | None:
    """Return the form of a router, None where it has none."""
    form = getattr(module, "form", None)
    return form if isinstance(form, RouterForm) else None


def forecaster_form(module: nn.Module) -> ForecasterForm | ZeroForm | None:
    """Return the form of a forecaster, None where it has none."""
    form = getattr(module, "form", None)
    return form if isinstance(form, ForecasterForm | ZeroForm) else None
