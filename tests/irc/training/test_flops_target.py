"""A target in FLOPs: which ratios a model can have, the loss, the threshold, and policies that fix their share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from irc.errors import InputError
from irc.model.flops import FlopsRange, flops_range, flops_ratio
from irc.model.routed import RoutedForCausalLM
from irc.training.budget import flops_budget
from irc.training.calibrate import calibrate, dial_points, measured_keep
from irc.training.stages import StageContext
from irc.training.static_depth import choose_units

CONTEXT = 16


@pytest.mark.parametrize("policy", ["informed", "skipgpt", "random", "static", "static-forecast"])
def test_the_range_is_that_of_the_flops_ratio(make_routed: Callable[..., RoutedForCausalLM], policy: str) -> None:
    model = make_routed(policy=policy)
    found = flops_range(model, CONTEXT)
    draws = torch.rand(len(model.units), generator=torch.Generator().manual_seed(0)).tolist()
    keep = {unit.name: draw for unit, draw in zip(model.units, draws, strict=True)}
    skipped = sum(found.saved[name] * (1 - kept) for name, kept in keep.items())
    assert found.most - skipped == pytest.approx(flops_ratio(model, keep, CONTEXT), rel=1e-12)
    assert found.least == pytest.approx(flops_ratio(model, dict.fromkeys(keep, 0.0), CONTEXT), rel=1e-12)
    assert found.ratio(found.share(0.8)) == pytest.approx(0.8)
    assert sum(found.weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("target", [0.9, 0.7, 0.6])
def test_the_threshold_meets_the_ratio(make_context: Callable[..., StageContext], shake: Any, target: float) -> None:
    context = make_context()
    model, text = shake(context.model), context.calibration_windows()
    budget = flops_budget(flops_range(model, CONTEXT), target)
    figures = calibrate(model, text, budget, context.progress)
    keep = measured_keep(model, text)
    assert flops_ratio(model, keep, CONTEXT) == pytest.approx(target, abs=0.01)
    assert figures["calibration_flops"] == pytest.approx(flops_ratio(model, keep, CONTEXT))
    assert figures["calibration_sparsity"] == pytest.approx(1 - sum(keep.values()) / len(keep))


def test_the_points_of_a_dial_meet_theirs(make_context: Callable[..., StageContext], shake: Any) -> None:
    context = make_context()
    found = flops_range(shake(context.model), CONTEXT)
    points = dial_points(context.model, context.calibration_windows(), [0.9, 0.6], context.progress, found)
    assert [point["flops"] for point in points] == [0.6, 0.9]
    for point in points:
        assert point["realized"] == pytest.approx(point["flops"], abs=0.01)
        assert flops_ratio(context.model, point["keep"], CONTEXT) == pytest.approx(point["realized"])


def test_the_loss_is_the_distance_of_the_ratio_over_all_that_can_be_removed() -> None:
    found = FlopsRange(1.05, {"a": 0.1, "b": 0.4})
    budget = flops_budget(found, 0.8)
    execution = {"a": torch.tensor(0.9), "b": torch.tensor(0.2)}
    expected = 1.05 - 0.1 * (1 - 0.9) - 0.4 * (1 - 0.2)
    assert budget.loss(execution).item() == pytest.approx(abs(0.8 - expected) / 0.5)
    assert flops_budget(found, 0.7).loss(execution).item() == pytest.approx(abs(0.7 - expected) / 0.5, abs=1e-6)


@pytest.mark.parametrize("ratio", [0.3, 0.549, 1.0, 1.2])
def test_a_ratio_out_of_reach_is_refused_with_the_least(ratio: float) -> None:
    with pytest.raises(InputError, match=rf"{ratio:g}.* 0\.550"):
        flops_budget(FlopsRange(1.05, {"a": 0.1, "b": 0.4}), ratio)


def test_units_are_chosen_cheapest_first_until_the_budget_is_met() -> None:
    costs = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 9.0}
    assert choose_units(costs, 0.5) == {"a", "b"}
    assert choose_units(costs, 0.625) == {"a", "b"}  # 2.5 units; halves are rounded to the even number
    weights = {"a": 0.1, "b": 0.4, "c": 0.4, "d": 0.1}
    assert choose_units(costs, 0.4, weights) == {"b"}  # the least cost for its weight
    assert choose_units(costs, 0.5, weights) == {"b", "a"}  # c is too large for the rest
    assert choose_units(costs, 1.0, weights) == set(costs)
    assert choose_units(costs, 0.0, weights) == set()
