"""Searches for the threshold that meets a target, from the logits that the thresholds before it led to."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from irc.training.budget import Budget
from irc.training.threshold import choose_shifts, equal_distance, log_odds, share_below

_SMALL = 0.02  # change of the log odds from which a step tells what the model answers
_MOST = 8.0
_NARROW = 0.03  # width between two thresholds, in standard deviations of the logits, in which a group is looked for


class Search:
    """Proposes the next threshold: a quantile of the logits, corrected by how the model answered the last one.

    Skipping changes what later routers read, and some models answer a shift by several times what the quantile says:
    quantiles alone would swing around the target for ever. What was answered is learnt from each step, and a threshold
    stays between those that skipped too much and too little. If the share jumps between two thresholds that are almost
    the same, the units whose logits are equal there keep their threshold from then on.

    Args:
        budget: What to meet.
        tolerance: Largest deviation from the target, as a share of all pairs.
        answer: What the model answered in another search (see `answer`).

    Attributes:
        answer: Change of the log odds of the share over the change that the quantile said.
    """

    def __init__(self, budget: Budget, tolerance: float, answer: float = 1.0) -> None:
        self._budget = budget
        self._tolerance = tolerance
        self._held: set[str] = set()
        self._sides: dict[bool, tuple[float, dict[str, float]]] = {}  # log odds and biases, by: skipped too much
        self.answer = answer
        self._step: tuple[float, float] | None = None  # log odds before the last shifts, and after them by the quantile

    def shifts(self, differences: Mapping[str, torch.Tensor], execute: Mapping[str, float]) -> dict[str, float]:
        """Return how much to lower the execute logit of each unit next.

        Args:
            differences: Execute logit minus approximate logit of each token under this threshold, [tokens] by unit.
            execute: Bias of the execute logit by unit: what this threshold is.
        """
        budget = self._budget
        skipped = share_below(differences, dict.fromkeys(differences, 0.0), budget.weights)
        here, target = log_odds(skipped), log_odds(budget.sparsity)
        self._learn(here)
        self._sides[here > target] = here, dict(execute)
        self._hold(differences)
        wanted = _share(here + (target - here) / self.answer)
        shifts = self._between(target, execute, self._quantiles(differences, wanted))
        self._step = here, log_odds(share_below(differences, shifts, budget.weights))
        return shifts

    def _learn(self, here: float) -> None:
        """Update what the model answers, from the last step; a step that was too small to tell changes nothing."""
        if self._step is not None and abs(self._step[1] - self._step[0]) > _SMALL:
            answer = (here - self._step[0]) / (self._step[1] - self._step[0])
            self.answer = min(max(answer, 1 / _MOST), _MOST)

    def _hold(self, differences: Mapping[str, torch.Tensor]) -> None:
        """Hold the units with a group of equal logits between two thresholds that are almost the same."""
        if len(self._sides) < 2:
            return
        (_, one), (_, other) = self._sides.values()
        free = [unit for unit in differences if unit not in self._held]
        width = max(abs(one[unit] - other[unit]) for unit in free)
        logits = torch.cat([differences[unit] for unit in free])
        if width > _NARROW * logits.std().item():
            return
        equal = equal_distance(logits)
        jumps = {
            unit
            for unit in free
            if self._budget.weights[unit] * _equal_share(differences[unit], width, equal) > self._tolerance
        }
        if jumps and len(jumps) < len(free):
            self._held |= jumps
            self._sides, self._step, self.answer = {}, None, 1.0

    def _quantiles(self, differences: Mapping[str, torch.Tensor], wanted: float) -> dict[str, float]:
        """Return shifts after which a share of all pairs would be skipped, if no logit answered."""
        weight = self._budget.weights
        held = {unit: values for unit, values in differences.items() if unit in self._held}
        free = {unit: values for unit, values in differences.items() if unit not in self._held}
        mass = sum(weight[unit] for unit in free)
        share = (wanted - share_below(held, dict.fromkeys(held, 0.0), weight)) / mass
        shifts = choose_shifts(free, share, self._tolerance, {unit: weight[unit] / mass for unit in free})
        return dict.fromkeys(differences, 0.0) | shifts

    def _between(self, target: float, execute: Mapping[str, float], shifts: dict[str, float]) -> dict[str, float]:
        """Return the shifts if they stay between both sides, otherwise shifts to a threshold in between."""
        if len(self._sides) < 2:
            return shifts
        (high, too_much), (low, too_little) = self._sides[True], self._sides[False]
        if sum(too_much.values()) < sum(execute[u] - shift for u, shift in shifts.items()) < sum(too_little.values()):
            return shifts
        part = (high - target) / (high - low)
        return {unit: execute[unit] - (bias + part * (too_little[unit] - bias)) for unit, bias in too_much.items()}


def _equal_share(values: torch.Tensor, width: float, equal: float) -> float:
    """Return the share of the largest group of equal values among those within a width of 0."""
    near = (values[values.abs() <= width] / equal).round()
    return near.unique(return_counts=True)[1].max().item() / len(values) if len(near) else 0.0


def _share(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))
