"""Thresholds are between tokens, and groups of equal tokens do not prevent the target from being met."""

from __future__ import annotations

import pytest
import torch

from irc.training.threshold import choose_shifts, quantile


@pytest.mark.parametrize(
    ("share", "below"), [(0.0, 0), (0.1, 10), (0.25, 25), (0.5, 50), (0.9, 90), (1.0, 100), (-1.0, 0), (2.0, 100)]
)
def test_quantile_leaves_the_share_below_and_touches_no_value(share: float, below: int) -> None:
    values = torch.randperm(100).float()
    threshold = quantile(values, share)
    assert int((values < threshold).sum()) == below
    assert float((values - threshold).abs().min()) >= 0.5


@pytest.mark.parametrize(("share", "below"), [(0.25, 20), (0.5, 60), (0.38, 20), (0.42, 60), (0.1, 10)])
def test_quantile_keeps_equal_values_together(share: float, below: int) -> None:
    """The values are 0..19, then forty that differ only by rounding, then forty more."""
    values = torch.cat([torch.arange(20.0), 20.5 + 1e-6 * torch.rand(40), torch.arange(21.0, 61.0)])
    threshold = quantile(values, share)
    assert int((values < threshold).sum()) == below
    assert float((values - threshold).abs().min()) > 0.1


def test_all_units_shift_alike_when_nothing_is_equal() -> None:
    units = {name: torch.randn(1000) for name in "abcd"}
    shifts = choose_shifts(units, 0.3, 0.001)
    assert len(set(shifts.values())) == 1
    assert skipped(units, shifts) == pytest.approx(0.3, abs=0.001)


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.6, 0.9])
def test_a_unit_that_cannot_be_split_is_made_up_for_by_the_others(target: float) -> None:
    units = {name: torch.randn(1000) for name in "bcd"} | {"a": quantile_of_normal(target) + torch.zeros(1000)}
    shifts = choose_shifts(units, target, 0.001)
    assert skipped(units, shifts) == pytest.approx(target, abs=0.001)


def test_a_heavy_unit_that_cannot_be_split_is_made_up_for_too() -> None:
    """The group is at the target by weight; without weights, 0.3 of all values would be far below it."""
    weights = {"a": 0.1, "b": 0.1, "c": 0.8}
    units = {"a": torch.randn(1000), "b": torch.randn(1000), "c": torch.randn(1000) + 1}
    units["c"][:200] = -0.5
    shifts = choose_shifts(units, 0.15, 0.001, weights)
    under = {name: float((values < shifts[name]).double().mean()) for name, values in units.items()}
    assert sum(weights[name] * share for name, share in under.items()) == pytest.approx(0.15, abs=0.001)


def test_nothing_can_be_done_when_every_unit_is_constant() -> None:
    units = {name: torch.zeros(10) for name in "ab"}
    assert skipped(units, choose_shifts(units, 0.4, 0.001)) in (0.0, 1.0)


def test_a_unit_counts_by_its_weight() -> None:
    units = {"a": torch.randn(1000), "b": torch.randn(1000) - 2}
    weights = {"a": 0.8, "b": 0.2}
    shifts = choose_shifts(units, 0.3, 0.001, weights)
    assert shifts["a"] == shifts["b"]
    under = {name: float((values < shifts[name]).double().mean()) for name, values in units.items()}
    assert 0.8 * under["a"] + 0.2 * under["b"] == pytest.approx(0.3, abs=0.001)
    assert under["b"] > 0.6 > 0.3 > under["a"]


def test_quantile_counts_by_mass() -> None:
    values, mass = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 8.0]).double()
    assert quantile(values, 0.1, mass) == 1.5
    assert quantile(values, 0.9, mass) == 2.5


def quantile_of_normal(share: float) -> float:
    return torch.distributions.Normal(0, 1).icdf(torch.tensor(share)).item()


def skipped(units: dict[str, torch.Tensor], shifts: dict[str, float]) -> float:
    return float(torch.cat([values - shifts[name] < 0 for name, values in units.items()]).double().mean())
