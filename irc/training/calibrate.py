"""Sets the routers' decision threshold on calibration text, for one target or for each point of a dial."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from irc.errors import IrcError
from irc.model.flops import FlopsRange
from irc.model.modules import EXECUTE, Record, Router
from irc.model.routed import RoutedForCausalLM
from irc.progress import ProgressFactory
from irc.recipe.policies import policy_named
from irc.training.budget import Budget, flops_budget, plain_budget
from irc.training.search import Search

log = logging.getLogger(__name__)

_ROUNDS = 8
_TOLERANCE = 0.001
_ENOUGH = 0.002  # distance on the whole text at which the search ends: less than the next text differs by
_WARN_DISTANCE = 0.02  # distance from the target at which a warning is logged
_BATCH = 16
_FEW, _FEW_ROUNDS = 8192, 3  # tokens of the first rounds, and at most how many of these there are


def set_threshold(
    model: RoutedForCausalLM, text: torch.Tensor, budget: Budget, progress: ProgressFactory
) -> dict[str, Any]:
    """Set the decision threshold if the policy has one.

    Args:
        model: Rewritten model.
        text: Calibration windows, int64 [windows, length].
        budget: What to approximate.
        progress: Makes a progress bar.

    Returns:
        The figures of `reached` on the calibration text. See `calibrate` for the others when a threshold was set.
    """
    assert model.spec is not None
    policy = policy_named(model.spec.policy)
    if policy.learns and not policy.capacity:
        return calibrate(model, text, budget, progress)
    return reached(measured_keep(model, text), budget)


def reached(keep: Mapping[str, float], budget: Budget) -> dict[str, Any]:
    """Return what was reached on the calibration text.

    Args:
        keep: Share of the text that each unit executes.
        budget: What was to be approximated.

    Returns:
        `calibration_sparsity`, `calibration_keep` (as given) and, for a target in FLOPs, `calibration_flops`.
    """
    figures = {"calibration_sparsity": 1 - sum(keep.values()) / len(keep), "calibration_keep": dict(keep)}
    if budget.flops is not None:
        share = budget.realized({unit: 1 - kept for unit, kept in keep.items()})
        figures["calibration_flops"] = budget.value(share)
    return figures


@torch.no_grad()
def calibrate(
    model: RoutedForCausalLM, text: torch.Tensor, budget: Budget, progress: ProgressFactory
) -> dict[str, Any]:
    """Set a threshold on the logit difference so that argmax routing meets the target.

    Routing changes the hidden states that later routers read. The quantile is therefore taken again under the new
    routes, until the realized share is within 0.002 of the target or 8 rounds have passed (see `Search`). The first
    rounds read a part of the text, up to a distance of 0.001. The best threshold found on all of it is added to the
    execute bias of each router.

    Args:
        model: Rewritten model.
        text: Calibration windows, int64 [windows, length].
        budget: What to approximate.
        progress: Makes a progress bar.

    Returns:
        `threshold_shift` (mean over the units), `calibration_rounds`, `calibration_seconds`, and the figures of
        `reached`.

    Raises:
        IrcError: The routers' weights are not finite.
    """
    started = time.monotonic()
    biases = _biases(model)
    shift = 0.0
    rounds = 0
    best = _Threshold(math.inf, math.nan, shift, _cloned(biases), {})
    search = Search(budget, _TOLERANCE)
    part = text[:: max(1, text.numel() // _FEW)]
    with progress("threshold", _ROUNDS) as bar:
        for rounds in range(1, _ROUNDS + 1):
            differences = _differences(model, part)
            keep = {unit: 1 - (values < 0).double().mean().item() for unit, values in differences.items()}
            skipped = {unit: 1 - share for unit, share in keep.items()}
            realized = budget.realized(skipped)
            distance = abs(realized - budget.sparsity)
            bar.update(rounds, **{budget.kind: budget.value(realized)})
            whole = len(part) == len(text)
            if whole and distance < best.distance:
                best = _Threshold(distance, realized, shift, _cloned(biases), keep)
            if best.distance <= _ENOUGH or rounds == _ROUNDS:
                break
            shifts = search.shifts(differences, {unit: bias[EXECUTE].item() for unit, bias in biases.items()})
            if not whole and (distance <= _TOLERANCE or rounds == _FEW_ROUNDS):
                part, search = text, Search(budget, _TOLERANCE, search.answer)
            if distance <= _TOLERANCE:
                continue
            for unit, bias in biases.items():
                bias[EXECUTE] -= shifts[unit]
            shift -= sum(shifts.values()) / len(shifts)
        bar.update(_ROUNDS, **{budget.kind: budget.value(best.realized)})
    if not all(bool(bias.isfinite().all()) for bias in best.biases.values()):
        raise IrcError("the routers' weights are no longer finite numbers; lower router.lr")
    found, wanted = budget.value(best.realized), budget.value(budget.sparsity)
    if abs(found - wanted) > _WARN_DISTANCE:
        log.warning(
            "the threshold gives %s of %.3f on the calibration text instead of %.3f: many tokens have the same "
            "logits, or the routes of a layer change those of the next too much",
            "a sparsity" if budget.flops is None else "a FLOPs ratio",
            found,
            wanted,
        )
    for unit, bias in biases.items():
        bias.copy_(best.biases[unit])
    return {
        "threshold_shift": best.shift,
        "calibration_rounds": float(rounds),
        "calibration_seconds": time.monotonic() - started,
        **reached(best.keep, budget),
        **({"calibration_sparsity": best.realized} if budget.flops is None else {}),
    }


@dataclass(frozen=True)
class _Threshold:
    """A threshold that was tried: its distance from the target, realized sparsity, mean shift, biases and shares."""

    distance: float
    realized: float
    shift: float
    biases: dict[str, torch.Tensor]
    keep: dict[str, float]


def _cloned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@torch.no_grad()
def dial_points(
    model: RoutedForCausalLM,
    text: torch.Tensor,
    targets: Sequence[float],
    progress: ProgressFactory,
    flops: FlopsRange | None = None,
) -> list[dict[str, Any]]:
    """Find the thresholds of other targets. The model's own threshold does not change.

    Args:
        model: Rewritten model.
        text: Calibration windows, int64 [windows, length].
        targets: Sparsities, or FLOPs ratios, in any order.
        progress: Makes a progress bar.
        flops: The ratios that the model can have, if the targets are ratios.

    Returns:
        For each target, in ascending order: `sparsity` or `flops`, `realized`, `shift` (to add to the execute logit of
        each unit) and `keep` (the share of the calibration text that each unit then executes).

    Raises:
        InputError: The model cannot reach a ratio.
    """
    biases = _biases(model)
    own = _cloned(biases)
    points = []
    for target in sorted(targets):
        budget = plain_budget(list(biases), target) if flops is None else flops_budget(flops, target)
        figures = calibrate(model, text, budget, progress)
        shift = {unit: (bias[EXECUTE] - own[unit][EXECUTE]).item() for unit, bias in biases.items()}
        points.append(
            {
                budget.kind: target,
                "realized": figures[f"calibration_{budget.kind}"],
                "shift": shift,
                "keep": figures["calibration_keep"],
            }
        )
    for unit, bias in biases.items():  # only now: each search begins at the threshold of the nearest target before it
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
    biases: dict[str, torch.Tensor] = {}
    for unit in model.units:
        router = model.part(unit, "router")
        assert isinstance(router, Router)
        biases[unit.name] = router.last.bias
    return biases


def _differences(model: RoutedForCausalLM, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return each unit's logit differences under deterministic routing, float32 [tokens]."""
    parts: dict[str, list[torch.Tensor]] = {unit.name: [] for unit in model.units}
    for batch in text.split(_BATCH):
        for name, record in _tape(model, batch).items():
            assert record.difference is not None
            parts[name].append(record.difference.flatten().cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _tape(model: RoutedForCausalLM, batch: torch.Tensor) -> dict[str, Record]:
    tape: dict[str, Record] = {}
    with model.control.using(mode="route", tape=tape):
        model.states(batch.to(model.device))
    return tape
