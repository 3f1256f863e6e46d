"""Budgets: how they weigh units, and that the threshold meets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from irc.model.flops import flops_range, flops_ratio
from irc.training.budget import Budget, flops_budget, plain_budget
from irc.training.calibrate import calibrate, measured_keep
from irc.training.stages import StageContext


@pytest.fixture
def context(make_context: Callable[..., StageContext], shake: Any) -> StageContext:
    context = make_context(sparsity=0.4)
    shake(context.model)
    return context


def budget_of(context: StageContext, kind: str) -> Budget:
    """Return a budget that removes 0.4 of the pairs, or of the FLOPs that can be removed."""
    if kind == "sparsity":
        return plain_budget([unit.name for unit in context.model.units], 0.4)
    found = flops_range(context.model, context.calibration_windows().shape[1])
    return flops_budget(found, found.ratio(0.4))


@pytest.mark.parametrize("kind", ["sparsity", "flops"])
def test_the_threshold_meets_the_budget(context: StageContext, kind: str) -> None:
    budget = budget_of(context, kind)
    figures = calibrate(context.model, context.calibration_windows(), budget, context.progress)
    keep = measured_keep(context.model, context.calibration_windows())
    share = budget.realized({unit: 1 - kept for unit, kept in keep.items()})
    assert figures["calibration_keep"] == pytest.approx(keep)
    assert figures[f"calibration_{kind}"] == pytest.approx(budget.value(share))
    assert share == pytest.approx(0.4, abs=0.01)


def test_flops_weigh_what_skipping_saves(context: StageContext) -> None:
    """The weight of a unit is the share of FLOPs that is saved when only that unit is skipped."""
    weights = budget_of(context, "flops").weights
    assert sum(weights.values()) == pytest.approx(1)
    length = context.calibration_windows().shape[1]
    every = dict.fromkeys(weights, 1.0)
    saved = {unit: flops_ratio(context.model, every, length) for unit in weights}
    saved = {unit: full - flops_ratio(context.model, {**every, unit: 0.0}, length) for unit, full in saved.items()}
    assert weights == pytest.approx({unit: value / sum(saved.values()) for unit, value in saved.items()})
    assert len(set(weights.values())) == 2  # attention and FFN differ


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
def test_the_loss_is_the_distance_from_the_target_and_pulls_towards_it(sparsity: float) -> None:
    execution = {"a": torch.tensor(0.9, requires_grad=True), "b": torch.tensor(0.2, requires_grad=True)}
    loss = plain_budget(["a", "b"], sparsity).loss(execution)
    assert loss.item() == pytest.approx(abs(0.55 - (1 - sparsity)))
    loss.backward()
    pull = 0.5 if 1 - sparsity < 0.55 else -0.5
    assert [mean.grad.item() for mean in execution.values() if mean.grad is not None] == [pull, pull]


def test_the_loss_counts_units_by_weight() -> None:
    budget = Budget(0.5, {"a": 0.75, "b": 0.25})
    execution = {"a": torch.tensor(1.0), "b": torch.tensor(0.0)}
    assert budget.loss(execution).item() == pytest.approx(0.25)
    assert budget.realized({"a": 0.0, "b": 1.0}) == 0.25
