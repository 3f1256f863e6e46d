"""The stages: `lff` fits forecasters, `router` trains routers and sets their threshold, `lora` adapts the base."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from irc.calibration import gathering, set_closed_form
from irc.config import Recipe
from irc.data import pick, windows
from irc.errors import InputError
from irc.lora import inject_lora, lora_parameters
from irc.modules import Forecaster, Record, Router
from irc.objectives import ForecastObjective, RoutingObjective
from irc.policies import policy_named
from irc.routed import RoutedForCausalLM
from irc.static_depth import drop_units
from irc.threshold import choose_shifts
from irc.train import LoopResult, LoopSettings, Progress, accelerator_for, train

log = logging.getLogger(__name__)

ProgressFactory = Callable[[str, int], AbstractContextManager[Progress]]

_CALIBRATION_ROUNDS = 8
_CALIBRATION_TOLERANCE = 0.001
_EVAL_BATCH = 16


@dataclass
class StageContext:
    """What every stage reads.

    Attributes:
        model: Rewritten model, changed in place.
        recipe: Resolved recipe.
        train_stream: int64 [tokens], train split.
        calibration_stream: int64 [tokens], calibration split.
        work: Folder for checkpoints.
        progress: Makes a progress bar.
    """

    model: RoutedForCausalLM
    recipe: Recipe
    train_stream: torch.Tensor
    calibration_stream: torch.Tensor
    work: Path
    progress: ProgressFactory

    @property
    def accelerator(self) -> Accelerator:
        """The process group and precision of this run."""
        return accelerator_for(self.recipe.device, self.recipe.precision)

    def settings(self, stage: str, steps: int, batch_size: int, floor: float) -> LoopSettings:
        """Return the loop settings of a stage with a cosine schedule down to `floor`."""
        return LoopSettings(
            steps=steps,
            batch_size=batch_size,
            schedule=cosine_schedule(floor),
            seed=self.recipe.seed,
            precision=self.recipe.precision,
            checkpoint=self.work / f"{stage}.checkpoint.safetensors",
            checkpoint_seconds=self.recipe.checkpoint_seconds,
        )

    def train_windows(self) -> torch.Tensor:
        """Windows of the train split, int64 [windows, length]."""
        return windows(self.train_stream, self.recipe.seq_len, "train split")

    def calibration_windows(self) -> torch.Tensor:
        """Windows of the calibration split that set the threshold, int64 [windows, length]."""
        text = windows(self.calibration_stream, self.recipe.seq_len, "calibration split")
        return pick(text, self.recipe.router.calibration_tokens)


def cosine_schedule(floor: float) -> Callable[[float], float]:
    """Return a learning-rate factor that falls from 1 to `floor` over progress 0..1."""
    return lambda progress: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def run_lff(context: StageContext) -> dict[str, float]:
    """Fit all forecasters: streaming statistics, closed form, refinement.

    Returns:
        Seconds of both parts, tokens read, and the mean train cosine after refinement.
    """
    recipe = context.recipe.lff
    settings = context.settings("lff", max(1, recipe.steps), recipe.batch_size, 0.0)
    seconds = 0.0
    if not settings.checkpoint.exists():
        seconds = fit_closed_form(context, context.train_windows())
    figures = {"closed_form_seconds": seconds, "tokens": float(recipe.tokens)}
    if recipe.steps:
        context.model.requires_grad_(False)
        objective = ForecastObjective(context.model, recipe.lr)
        _learn(context.model, "forecaster")
        with context.progress("lff", recipe.steps) as progress:
            result = train(objective, context.train_windows(), settings, progress, context.accelerator)
        figures |= {"refine_seconds": result.seconds, "cosine": result.figures["cosine"]}
    return figures


def fit_closed_form(context: StageContext, text: torch.Tensor) -> float:
    """Stream text through the dense model once and solve every forecaster; returns seconds."""
    model, recipe = context.model, context.recipe
    started = time.monotonic()
    chosen = pick(text, recipe.lff.tokens)
    with (
        context.progress("lff statistics", len(chosen)) as progress,
        gathering(model) as statistics,
        model.control.using(mode="execute"),
        torch.no_grad(),
        _autocast(context),
    ):
        done = 0
        for batch in chosen.split(_EVAL_BATCH):
            model(input_ids=batch.to(model.device), use_cache=False)
            done += len(batch)
            progress.update(done, tokens_per_s=done * text.shape[1] / (time.monotonic() - started))
    for unit in model.units:
        forecaster = model.part(unit, "forecaster")
        assert isinstance(forecaster, Forecaster)
        set_closed_form(forecaster, statistics[unit.name], forecaster.down.out_features, recipe.lff.ridge)
    return time.monotonic() - started


def run_router(context: StageContext) -> dict[str, Any]:
    """Train the routers (and the forecasters along with them), then set the decision threshold."""
    recipe = context.recipe.router
    model = context.model
    if context.recipe.policy == "static":
        return drop_units(model, context.calibration_windows(), context.recipe.sparsity)
    for unit in model.units if recipe.start else ():
        router = model.part(unit, "router")
        if isinstance(router, Router):
            router.shift(recipe.start)  # a checkpoint, where there is one, holds it already and takes its place
    model.requires_grad_(False)
    _learn(model, "router")
    if recipe.forecaster_lr > 0:
        _learn(model, "forecaster")
    objective = RoutingObjective(model, recipe, context.recipe.sparsity, context.recipe.seed, recipe.steps)
    if not any(group["params"] for group in objective.trainable()):
        return set_threshold(context)
    settings = context.settings("router", recipe.steps, recipe.batch_size, 0.1)
    with context.progress("router", recipe.steps) as progress:
        result = train(objective, context.train_windows(), settings, progress, context.accelerator)
    return {**_figures(result), **set_threshold(context)}


def run_lora(context: StageContext) -> dict[str, Any]:
    """Train LoRA adapters on the base's linears with deterministic routing, then set the threshold again."""
    recipe = context.recipe.lora
    model = context.model
    model.requires_grad_(False)
    inject_lora(model, recipe, context.recipe.seed)
    extra = (lora_parameters(model), recipe.lr)
    objective = RoutingObjective(
        model, context.recipe.router, context.recipe.sparsity, context.recipe.seed, recipe.steps, extra
    )
    settings = context.settings("lora", recipe.steps, recipe.batch_size, 0.0)
    with context.progress("lora", recipe.steps) as progress:
        result = train(objective, context.train_windows(), settings, progress, context.accelerator)
    return {**_figures(result), **set_threshold(context)}


def set_threshold(context: StageContext) -> dict[str, Any]:
    """Set the routers' threshold where there is one to set; return what each unit executes of the calibration text."""
    policy = policy_named(context.recipe.policy)
    if policy.learns and not policy.capacity:
        return calibrate_threshold(context)
    keep = measured_keep(context.model, context.calibration_windows())
    return {"calibration_sparsity": 1 - sum(keep.values()) / len(keep), "calibration_keep": keep}


@torch.no_grad()
def calibrate_threshold(context: StageContext) -> dict[str, Any]:
    """Set a threshold on the logit difference so that argmax routing meets the target sparsity.

    Routing changes the hidden states that later routers read, so the quantile is taken again under the
    new routes until realized sparsity stands within 0.001 of the target, or the rounds are used up: then
    the best threshold met stays. It is folded into the execute bias of every router.

    Returns:
        Shift (the units' mean), rounds, and on the calibration text the realized sparsity and `calibration_keep`,
        the share of tokens that each unit executes.
    """
    model, target = context.model, context.recipe.sparsity
    started = time.monotonic()
    chosen = context.calibration_windows()
    biases = [p for name, p in model.adapter_parameters("router").items() if name.endswith("2.bias")]
    total, gap, rounds = 0.0, math.inf, 0
    keep: dict[str, float] = {}
    best = (math.nan, total, [bias.clone() for bias in biases], keep)
    with context.progress("threshold", _CALIBRATION_ROUNDS) as progress:
        for rounds in range(1, _CALIBRATION_ROUNDS + 1):
            differences = _differences(model, chosen)
            realized = (torch.cat(list(differences.values())) < 0).double().mean().item()
            progress.update(rounds, sparsity=realized)
            if abs(realized - target) < gap:
                gap = abs(realized - target)
                keep = {unit: (values >= 0).double().mean().item() for unit, values in differences.items()}
                best = (realized, total, [bias.clone() for bias in biases], keep)
            if gap <= _CALIBRATION_TOLERANCE or rounds == _CALIBRATION_ROUNDS:
                break
            shifts = choose_shifts(differences, target, _CALIBRATION_TOLERANCE)
            for unit in model.units:
                router = model.part(unit, "router")
                assert isinstance(router, Router)
                router.shift(-shifts[unit.name])
            total -= sum(shifts.values()) / len(shifts)
        progress.update(_CALIBRATION_ROUNDS, sparsity=best[0])
    realized, total, kept, keep = best
    for bias, value in zip(biases, kept, strict=True):
        bias.copy_(value)
    return {
        "threshold_shift": total,
        "calibration_rounds": float(rounds),
        "calibration_sparsity": realized,
        "calibration_seconds": time.monotonic() - started,
        "calibration_keep": keep,
    }


def _differences(model: RoutedForCausalLM, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the logit differences of all tokens by unit under deterministic routing, float32 [tokens]."""
    found: dict[str, list[torch.Tensor]] = {unit.name: [] for unit in model.units}
    for batch in text.split(_EVAL_BATCH):
        tape: dict[str, Record] = {}
        with model.control.using(mode="route", tape=tape):
            model(input_ids=batch.to(model.device), use_cache=False)
        for name, record in tape.items():
            assert record.difference is not None
            found[name].append(record.difference.flatten().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def measured_keep(model: RoutedForCausalLM, text: torch.Tensor) -> dict[str, float]:
    """Return the share of tokens that each unit executes under deterministic routing."""
    executed = {unit.name: 0 for unit in model.units}
    for batch in text.split(_EVAL_BATCH):
        tape: dict[str, Record] = {}
        with model.control.using(mode="route", tape=tape):
            model(input_ids=batch.to(model.device), use_cache=False)
        for name, record in tape.items():
            executed[name] += int(record.execute.sum())
    return {name: count / text.numel() for name, count in executed.items()}


def _learn(model: RoutedForCausalLM, role: str) -> None:
    for parameter in model.adapter_parameters(role).values():
        parameter.requires_grad_(True)


def _figures(result: LoopResult) -> dict[str, float]:
    return {"train_seconds": result.seconds, "train_tokens": float(result.tokens), **result.figures}


@contextmanager
def _autocast(context: StageContext) -> Iterator[None]:
    kind = context.model.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=context.recipe.precision == "bf16"):
        yield


def check_text(context: StageContext) -> None:
    """Refuse text too short to train and calibrate on, before any work is done."""
    for name, stream in (("train", context.train_stream), ("calibration", context.calibration_stream)):
        if stream.numel() < context.recipe.seq_len:
            raise InputError(
                f"the {name} split of {context.recipe.data} has {stream.numel()} tokens, less than one window of "
                f"{context.recipe.seq_len}; give more text or a shorter --seq-len"
            )
