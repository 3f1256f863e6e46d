"""Policies `static` and `static-forecast`: skip whole units, the cheapest first.

`static` drops them (ShortGPT, arXiv 2403.03853, applied to units). The importance of a unit is one minus the mean
cosine between the residual stream before and after the unit adds its output. A unit that does not turn the stream can
be dropped. `static-forecast` replaces units by their forecasts. There the importance of a unit is how much the loss
grows when only this unit is replaced. Both are measured once, on the otherwise dense model and the calibration text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from irc.model.head import parts
from irc.model.policies import StaticRouter
from irc.model.routed import RoutedForCausalLM
from irc.recipe.policies import policy_named
from irc.text.source import pick
from passes.match import Unit

_BATCH = 16
_COST_TOKENS = 8192  # costs are differences on the same text, so that few tokens tell them apart


def drop_units(
    model: RoutedForCausalLM, text: torch.Tensor, sparsity: float, weights: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Skip the least important share of a model's units for every token.

    Args:
        model: Rewritten under policy `static` or `static-forecast`; its routers are changed in place.
        text: Calibration windows, int64 [windows, length].
        sparsity: Share of units to drop; with weights, the sum of the weights to drop.
        weights: See `choose_units`.

    Returns:
        `importance` by unit, `calibration_sparsity` (the realized share), and `calibration_keep`, 0 or 1 by unit.
    """
    assert model.spec is not None
    measure = forecast_costs if policy_named(model.spec.policy).forecasts else unit_importance
    importance = measure(model, text)
    dropped = choose_units(importance, sparsity, weights)
    for unit in model.units:
        _router(model, unit).choose(unit.name not in dropped)
    return {
        "importance": importance,
        "calibration_sparsity": len(dropped) / len(importance),
        "calibration_keep": {unit.name: float(unit.name not in dropped) for unit in model.units},
    }


def choose_units(costs: Mapping[str, float], share: float, weights: Mapping[str, float] | None = None) -> set[str]:
    """Return the units to drop, the cheapest first.

    Args:
        costs: What dropping each unit costs.
        share: Share of the units to drop, rounded to whole units; with weights, the sum of the weights to drop, which
            is met as nearly as whole units can.
        weights: What dropping each unit saves, above 0. The cheapest unit is then that of the least cost for its
            weight, and a unit that is larger than what is left to save gives way to smaller ones.
    """
    if weights is None:
        return set(sorted(costs, key=costs.__getitem__)[: round(share * len(costs))])
    dropped, left = set(), share
    for unit in sorted(costs, key=lambda unit: costs[unit] / weights[unit]):
        if abs(left - weights[unit]) < abs(left):
            dropped.add(unit)
            left -= weights[unit]
    return dropped


@torch.no_grad()
def forecast_costs(model: RoutedForCausalLM, text: torch.Tensor) -> dict[str, float]:
    """Return how much the loss grows, in nats per token, if its forecast replaces a unit, for each unit alone.

    Args:
        model: Rewritten under policy `static-forecast`, with fitted forecasters.
        text: int64 [windows, length]; 8,192 tokens of it are read, spread evenly, once for every unit.
    """
    some = pick(text, _COST_TOKENS)
    for unit in model.units:
        _router(model, unit).choose(True)
    dense = _loss(model, some)
    costs = {}
    for unit in model.units:
        _router(model, unit).choose(False)
        costs[unit.name] = _loss(model, some) - dense
        _router(model, unit).choose(True)
    return costs


def _loss(model: RoutedForCausalLM, text: torch.Tensor) -> float:
    """Return the mean language-model loss of a text under the model's routes."""
    total = 0.0
    for rows in text.split(_BATCH):
        batch = rows.to(model.device)
        states, targets = model.states(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        for part in parts(targets, model.config.vocab_size):
            logits = model.logits(states[part]).float()
            total += F.cross_entropy(logits, targets[part], reduction="sum").double().item()
    return total / (text.numel() - len(text))


def _router(model: RoutedForCausalLM, unit: Unit) -> StaticRouter:
    router = model.part(unit, "router")
    assert isinstance(router, StaticRouter)
    return router


@torch.no_grad()
def unit_importance(model: RoutedForCausalLM, text: torch.Tensor) -> dict[str, float]:
    """Return one minus the mean cosine of the residual stream before and after each unit, with every unit executed.

    Args:
        model: Rewritten under policy `static`, so that its routers read the residual stream.
        text: int64 [windows, length].
    """
    streams: dict[str, torch.Tensor] = {}
    totals = {unit.name: 0.0 for unit in model.units}
    handles = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            streams[name] = arguments[0]

        return hook

    def measure(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            stream, y = streams.pop(name).float(), arguments[0].float()
            totals[name] += (1 - F.cosine_similarity(stream, stream + y, dim=-1)).double().sum().item()

        return hook

    for unit in model.units:
        handles.append(model.part(unit, "router").register_forward_pre_hook(remember(unit.name)))
        handles.append(model.part(unit, "mux").register_forward_pre_hook(measure(unit.name)))
    try:
        with model.control.using(mode="execute"):
            for batch in text.split(_BATCH):
                model.states(batch.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / text.numel() for name, total in totals.items()}
