"""Budgets: their weights, their targets for each unit, and that the threshold meets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from irc.model.flops import flops_ratio
from irc.model.routed import RoutedForCausalLM
from irc.training.budget import Budget, allocate_shares, make_budget, plain_budget
from irc.training.calibrate import _differences, calibrate, measured_keep
from irc.training.stages import StageContext, run_lff
from irc.training.threshold import quantile

KINDS = ["model", "flops", "unit", "recoverability"]


@pytest.fixture
def context(make_context: Callable[..., StageContext], shake: Any) -> StageContext:
    context = make_context(sparsity=0.4)
    shake(context.model)
    return context


def budget_of(context: StageContext, kind: str, sparsity: float = 0.4) -> Budget:
    return make_budget(context.model, kind, sparsity, context.calibration_windows())


@pytest.mark.parametrize("kind", KINDS)
def test_the_threshold_meets_the_budget(context: StageContext, kind: str) -> None:
    budget = budget_of(context, kind)
    figures = calibrate(context.model, context.calibration_windows(), budget, context.progress)
    keep = measured_keep(context.model, context.calibration_windows())
    skipped = {unit: 1 - share for unit, share in keep.items()}
    assert figures["calibration_keep"] == pytest.approx(keep)
    assert figures["calibration_sparsity"] == pytest.approx(budget.realized(skipped))
    if budget.targets is None:
        assert budget.realized(skipped) == pytest.approx(0.4, abs=0.01)
    else:  # tokens with equal logits are skipped together, so no threshold comes nearer
        assert skipped == pytest.approx(budget.targets, abs=0.1)
        differences = _differences(context.model, context.calibration_windows())
        for unit, values in differences.items():
            threshold = quantile(values, budget.targets[unit])
            assert int((values < threshold).sum()) == pytest.approx(int((values < 0).sum()), abs=3)


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


def test_a_recoverable_unit_may_skip_more(make_context: Callable[..., StageContext]) -> None:
    context = make_context(sparsity=0.4)
    run_lff(context)
    targets = budget_of(context, "recoverability").targets
    assert targets is not None
    assert sum(targets.values()) / len(targets) == pytest.approx(0.4)
    tape: dict[str, Any] = {}
    with torch.no_grad(), context.model.control.using(mode="execute", tape=tape, measure_error=True):
        context.model(input_ids=context.calibration_windows(), use_cache=False)
    cosine = {unit: record.cosine.mean().item() for unit, record in tape.items()}
    assert sorted(targets, key=targets.__getitem__) == sorted(cosine, key=cosine.__getitem__)
    ratio = {unit: share * (1 - cosine[unit]) for unit, share in targets.items() if share < 0.95}
    assert max(ratio.values()) == pytest.approx(min(ratio.values()), rel=1e-3)


def test_shares_have_a_ceiling_and_keep_the_mean() -> None:
    shares = allocate_shares({"a": 100.0, "b": 2.0, "c": 1.0}, 0.5)
    assert shares == pytest.approx({"a": 0.95, "b": 0.55 * 2 / 3, "c": 0.55 / 3})
    assert allocate_shares({"a": 3.0, "b": 1.0}, 1.0) == pytest.approx({"a": 1.0, "b": 1.0})
    assert allocate_shares({"a": 3.0, "b": 1.0}, 0.0) == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
def test_loss_of_units_is_the_mean_distance_and_pulls_each_its_own_way(sparsity: float) -> None:
    execution = {"a": torch.tensor(0.9, requires_grad=True), "b": torch.tensor(0.2, requires_grad=True)}
    plain = plain_budget(["a", "b"], sparsity)
    each = Budget(sparsity, plain.weights, {"a": 0.3, "b": 0.5})
    loss = each.loss(execution, sparsity)
    assert loss.item() == pytest.approx((abs(0.9 - 0.7) + abs(0.2 - 0.5)) / 2)
    loss.backward()
    gradients = {unit: mean.grad.item() for unit, mean in execution.items() if mean.grad is not None}
    assert gradients == pytest.approx({"a": 0.5, "b": -0.5})
    assert plain.loss(execution, sparsity).item() == pytest.approx(abs(0.55 - (1 - sparsity)))


def test_loss_counts_units_by_weight() -> None:
    budget = Budget(0.5, {"a": 0.75, "b": 0.25})
    execution = {"a": torch.tensor(1.0), "b": torch.tensor(0.0)}
    assert budget.loss(execution, 0.5).item() == pytest.approx(0.25)
    assert budget.realized({"a": 0.0, "b": 1.0}) == 0.25


def test_the_plain_budget_is_the_models(make_routed: Callable[..., RoutedForCausalLM]) -> None:
    model = make_routed()
    budget = make_budget(model, "model", 0.3, torch.zeros(1, 8, dtype=torch.long))
    assert budget == plain_budget([unit.name for unit in model.units], 0.3)
