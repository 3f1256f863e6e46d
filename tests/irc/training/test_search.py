"""A threshold is found although routers answer by more than the quantile says, and although units cannot be split."""

from __future__ import annotations

import pytest
import torch

from irc.training.budget import plain_budget
from irc.training.search import Search

UNITS = tuple("abcd")
TOLERANCE = 0.001


class Model:
    """Logits of four units; b, c and d answer what a skips, and all answer what was skipped before.

    Args:
        group: Share of the tokens of unit a that have the same logit, at the quantile 0.4 of the others.
        feedback: How far the other units' logits fall when unit a skips that group.
        gain: How far all logits fall per skipped share: over 1, plain quantiles swing.
    """

    def __init__(self, group: float, feedback: float, gain: float) -> None:
        torch.manual_seed(0)
        self.own = {unit: torch.randn(4000) for unit in UNITS}
        self.own["a"][: int(4000 * group)] = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.4)).item()
        self.feedback, self.gain = feedback, gain
        self.execute = dict.fromkeys(UNITS, 0.0)

    def differences(self) -> dict[str, torch.Tensor]:
        mean = sum(self.execute.values()) / len(UNITS)
        answer = {unit: self.own[unit] + self.execute[unit] + self.gain * mean for unit in UNITS}
        answer["a"] = self.own["a"] + self.execute["a"]
        skipped = (answer["a"][: max(1, len(self.own["a"]) // 20)] < 0).double().mean().item()
        return {unit: values - (self.feedback * skipped if unit != "a" else 0.0) for unit, values in answer.items()}


def search(model: Model, target: float, rounds: int = 8) -> float:
    """Return the distance from the target of the best of some rounds."""
    looking = Search(plain_budget(list(UNITS), target), TOLERANCE)
    best = 1.0
    for _ in range(rounds):
        differences = model.differences()
        realized = sum((values < 0).double().mean().item() for values in differences.values()) / len(UNITS)
        best = min(best, abs(realized - target))
        shifts = looking.shifts(differences, model.execute)
        model.execute = {unit: model.execute[unit] - shifts[unit] for unit in UNITS}
    return best


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("gain", [0.0, 1.5, 4.0])
def test_strong_answers_do_not_swing_for_ever(target: float, gain: float) -> None:
    assert search(Model(0.0, 0.0, gain), target) <= 0.002


@pytest.mark.parametrize("feedback", [0.0, 0.1])
def test_a_group_of_equal_logits_that_others_answer_is_made_up_for(feedback: float) -> None:
    """The target lies inside the jump: no common threshold gives it."""
    assert search(Model(0.07, feedback, 0.0), 0.42) <= 0.002
