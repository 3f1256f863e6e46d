"""Sets the routers' decision threshold on calibration text, for one target sparsity or a range of them (the dial)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from irc.errors import IrcError
from irc.model.modules import EXECUTE, Record, Router
from irc.model.routed import RoutedForCausalLM
from irc.progress import ProgressFactory
from irc.recipe.policies import policy_named
from irc.training.budget import Budget, plain_budget
from irc.training.threshold import choose_shifts, quantile

log = logging.getLogger(__name__)

_ROUNDS = 8
_TOLERANCE = 0.001
_FAR = 0.02  # from the target; worth a word
_BATCH = 16


def set_threshold(
    model: RoutedForCausalLM, text: torch.Tensor, budget: Budget, progress: ProgressFactory
) -> dict[str, Any]:
    """Set the threshold where the policy has one to set; return what each unit executes of the calibration text.

    Args:
        model: Rewritten model.
        text: Calibration windows, int64 [windows, length].
        budget: What is to be approximated.
        progress: Makes a progress bar.
    """
    assert model.spec is not None
    policy = policy_named(model.spec.policy)
    if policy.learns and not policy.capacity:
        return calibrate(model, text, budget, progress)
    keep = measured_keep(model, text)
    return {"calibration_sparsity": 1 - sum(keep.values()) / len(keep), "calibration_keep": keep}


@torch.no_grad()
def calibrate(
    model: RoutedForCausalLM, text: torch.Tensor, budget: Budget, progress: ProgressFactory
) -> dict[str, Any]:
    """Set a threshold on the logit difference so that argmax routing meets the target sparsity.

    Routing changes the hidden states that later routers read, so the quantile is taken again under the
    new routes until realized sparsity stands within 0.001 of the target, or the rounds are used up: then
    the best threshold met stays. It is folded into the execute bias of every router.

    Returns:
        Shift (the units' mean), rounds, and on the calibration text the realized sparsity and `calibration_keep`,
        the share of tokens that each unit executes.
    """
    started = time.monotonic()
    biases = _biases(model)
    total, gap, rounds = 0.0, math.inf, 0
    keep: dict[str, float] = {}
    best = (math.nan, total, {unit: bias.clone() for unit, bias in biases.items()}, keep)
    with progress("threshold", _ROUNDS) as bar:
        for rounds in range(1, _ROUNDS + 1):
            differences = _differences(model, text)
            keep_now = {unit: 1 - (values < 0).double().mean().item() for unit, values in differences.items()}
            skipped = {unit: 1 - share for unit, share in keep_now.items()}
            realized, missed = budget.realized(skipped), budget.missed(skipped)
            bar.update(rounds, sparsity=realized)
            if missed < gap:
                gap, keep = missed, keep_now
                best = (realized, total, {unit: bias.clone() for unit, bias in biases.items()}, keep)
            if gap <= _TOLERANCE or rounds == _ROUNDS:
                break
            shifts = _shifts(differences, budget)
            for unit, bias in biases.items():
                bias[EXECUTE] -= shifts[unit]
            total -= sum(shifts.values()) / len(shifts)
        bar.update(_ROUNDS, sparsity=best[0])
    realized, total, kept, keep = best
    if not all(bool(bias.isfinite().all()) for bias in kept.values()):
        raise IrcError("the routers' weights are no longer finite numbers; lower router.lr, or set router.clip=1")
    if abs(realized - budget.sparsity) > _FAR:
        log.warning(
            "the threshold gives a sparsity of %.3f on the calibration text in place of %.3f: many tokens are alike to "
            "the routers",
            realized,
            budget.sparsity,
        )
    for unit, bias in biases.items():
        bias.copy_(kept[unit])
    return {
        "threshold_shift": total,
        "calibration_rounds": float(rounds),
        "calibration_sparsity": realized,
        "calibration_seconds": time.monotonic() - started,
        "calibration_keep": keep,
    }


def _shifts(differences: dict[str, torch.Tensor], budget: Budget) -> dict[str, float]:
    if budget.targets is None:
        return choose_shifts(differences, budget.sparsity, _TOLERANCE, budget.weights)
    return {unit: quantile(values, budget.targets[unit]) for unit, values in differences.items()}


@torch.no_grad()
def dial_points(
    model: RoutedForCausalLM, text: torch.Tensor, targets: Sequence[float], progress: ProgressFactory
) -> list[dict[str, Any]]:
    """Find the thresholds of other sparsities; the model's own stay as they are.

    Returns:
        For each target, in ascending order: `sparsity`, `realized`, `shift` (what to add to the execute logit of each
        unit) and `keep` (what each unit then executes of the calibration text).
    """
    biases = _biases(model)
    own = {unit: bias.clone() for unit, bias in biases.items()}
    points = []
    for target in sorted(targets):
        found = calibrate(model, text, plain_budget(list(biases), target), progress)
        shift = {unit: (bias[EXECUTE] - own[unit][EXECUTE]).item() for unit, bias in biases.items()}
        points.append(
            {
                "sparsity": target,
                "realized": found["calibration_sparsity"],
                "shift": shift,
                "keep": found["calibration_keep"],
            }
        )
        for unit, bias in biases.items():
            bias.copy_(own[unit])
    return points


@torch.no_grad()
def measured_keep(model: RoutedForCausalLM, text: torch.Tensor) -> dict[str, float]:
    """Return the share of tokens that each unit executes under deterministic routing."""
    executed = {unit.name: 0 for unit in model.units}
    for batch in text.split(_BATCH):
        for name, record in _tape(model, batch).items():
            executed[name] += int(record.execute.sum())
    return {name: count / text.numel() for name, count in executed.items()}


def _biases(model: RoutedForCausalLM) -> dict[str, torch.Tensor]:
    """Return the last bias of every router, [2], by unit."""
    found: dict[str, torch.Tensor] = {}
    for unit in model.units:
        router = model.part(unit, "router")
        assert isinstance(router, Router)
        found[unit.name] = router.last.bias
    return found


def _differences(model: RoutedForCausalLM, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the logit differences of all tokens by unit under deterministic routing, float32 [tokens]."""
    found: dict[str, list[torch.Tensor]] = {unit.name: [] for unit in model.units}
    for batch in text.split(_BATCH):
        for name, record in _tape(model, batch).items():
            assert record.difference is not None
            found[name].append(record.difference.flatten().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _tape(model: RoutedForCausalLM, batch: torch.Tensor) -> dict[str, Record]:
    tape: dict[str, Record] = {}
    with model.control.using(mode="route", tape=tape):
        model.states(batch.to(model.device))
    return tape
