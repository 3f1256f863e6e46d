"""The stages: `lff` fits forecasters, `router` trains routers and sets their threshold, `lora` adapts the base."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from irc.errors import InputError
from irc.model.modules import Forecaster, Router
from irc.model.paging import released
from irc.model.routed import RoutedForCausalLM
from irc.progress import Progress, ProgressFactory
from irc.recipe.policies import policy_named
from irc.recipe.recipe import Recipe
from irc.text.source import pick, windows
from irc.training.budget import Budget, make_budget
from irc.training.calibrate import set_threshold
from irc.training.closed_form import gathering, set_closed_form
from irc.training.layerwise import layer_by_layer, outermost
from irc.training.loop import LoopResult, LoopSettings, Objective, accelerator_for, train
from irc.training.lora import inject_lora, lora_config, lora_parameters
from irc.training.objectives import ForecastObjective, RoutingObjective
from irc.training.recompute import recomputing
from irc.training.sharding import shard_base, sharding_wanted
from irc.training.static_depth import drop_units
from irc.training.teaching import TeachObjective

log = logging.getLogger(__name__)

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

    def train(self, objective: Objective, settings: LoopSettings, progress: Progress) -> LoopResult:
        """Run a stage's loop on the train split."""
        with recomputing(self.model, self.recipe.activation_checkpointing and objective.through_layers):
            return train(objective, self.train_windows(), settings, progress, self.accelerator)

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


def run_lff(context: StageContext) -> dict[str, Any]:
    """Fit all forecasters: streaming statistics, closed form, refinement.

    Returns:
        Seconds of both parts, tokens read, and the mean train cosine after refinement.
    """
    recipe = context.recipe.lff
    settings = context.settings("lff", max(1, recipe.steps), recipe.batch_size, 0.0)
    seconds, worked = 0.0, time.process_time()
    if not settings.checkpoint.exists():
        seconds = fit_closed_form(context, context.train_windows())
        settings.spent = (seconds, time.process_time() - worked)
    figures: dict[str, Any] = {"closed_form_seconds": seconds, "tokens": float(recipe.tokens)}
    if recipe.steps:
        context.model.requires_grad_(False)
        objective = ForecastObjective(context.model, recipe.lr)
        _learn(context.model, "forecaster")
        blocks = outermost({unit.block for unit in context.model.units})
        # Nothing is propagated back through a layer: its weights are not needed again in this step.
        with released(context.model.graph, blocks), context.progress("lff", recipe.steps) as progress:
            result = context.train(objective, settings, progress)
        figures |= {
            "refine_seconds": result.seconds,
            "cosine": result.figures["cosine"],
            "earlier_seconds": result.earlier,
        }
    return figures


def fit_closed_form(context: StageContext, text: torch.Tensor) -> float:
    """Stream text through the dense model once, layer by layer, and solve every forecaster; returns seconds."""
    model, recipe = context.model, context.recipe
    started = time.monotonic()
    chosen = pick(text, recipe.lff.tokens)
    layers = len({unit.layer for unit in model.units})
    done = 0
    with (
        context.progress("lff statistics", len(chosen) * layers) as progress,
        model.control.using(mode="execute"),
        torch.no_grad(),
        _autocast(context),
    ):

        def advance(windows: int) -> None:
            nonlocal done
            done += windows
            rate = done / layers * text.shape[1] / (time.monotonic() - started)
            progress.update(done, tokens_per_s=rate)

        for units, compute in layer_by_layer(model, chosen.split(_EVAL_BATCH)):
            with gathering(model, units=units) as statistics:
                compute(advance)
            for unit in units:
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
    budget = _budget(context)
    taught = _teach(context) if recipe.teach_steps > 0 else None
    if recipe.forecaster_lr > 0:  # only now: they do not learn while routers are taught
        _learn(model, "forecaster")
    objective = RoutingObjective(
        model, recipe, context.recipe.sparsity, context.recipe.seed, recipe.steps, budget=budget
    )
    if not any(group["params"] for group in objective.trainable()):
        return _threshold(context, budget)
    settings = context.settings("router", recipe.steps, recipe.batch_size, 0.1)
    settings.clip = recipe.clip
    if taught is not None:
        settings.spent = (taught.seconds, taught.cpu_seconds)
    with context.progress("router", recipe.steps) as progress:
        result = context.train(objective, settings, progress)
    if taught is not None:
        result.earlier = taught.earlier
    return {**_figures(result), **_threshold(context, budget)}


def _teach(context: StageContext) -> LoopResult | None:
    """Let the routers learn what forecasts cost; None where the router stage has begun: it holds what came of it."""
    recipe = context.recipe.router
    if (context.work / "router.checkpoint.safetensors").exists():
        return None
    objective = TeachObjective(context.model, recipe.lr, context.recipe.sparsity)
    settings = context.settings("teach", recipe.teach_steps, recipe.batch_size, 0.0)
    with context.progress("teach", recipe.teach_steps) as progress:
        # Never with activation checkpointing: what the objective reads of a layer would be gone.
        return train(objective, context.train_windows(), settings, progress, context.accelerator)


def run_lora(context: StageContext) -> dict[str, Any]:
    """Train LoRA adapters on the base's linears with deterministic routing, then set the threshold again."""
    recipe = context.recipe.lora
    model = context.model
    model.requires_grad_(False)
    inject_lora(model, recipe, context.recipe.seed)
    groups = [{"params": lora_parameters(model), "lr": recipe.lr}]
    learns = policy_named(context.recipe.policy).learns
    for role, rate in (("forecaster", recipe.forecaster_lr), ("router", recipe.router_lr if learns else 0.0)):
        if rate > 0 and model.adapter_parameters(role):
            _learn(model, role)
            groups.append({"params": model.adapter_parameters(role), "lr": rate})
    budget = _budget(context)
    objective = RoutingObjective(
        model,
        context.recipe.router,
        context.recipe.sparsity,
        context.recipe.seed,
        recipe.steps,
        lora=groups,
        sampled=learns and recipe.router_lr > 0,
        budget=budget,
    )
    settings = context.settings("lora", recipe.steps, recipe.batch_size, 0.0)
    with context.progress("lora", recipe.steps) as progress:
        result = context.train(objective, settings, progress)
    return {**_figures(result), **_threshold(context, budget)}


def _threshold(context: StageContext, budget: Budget) -> dict[str, Any]:
    return set_threshold(context.model, context.calibration_windows(), budget, context.progress)


def _budget(context: StageContext) -> Budget:
    recipe = context.recipe
    return make_budget(context.model, recipe.router.budget, recipe.sparsity, context.calibration_windows())


def _learn(model: RoutedForCausalLM, role: str) -> None:
    for parameter in model.adapter_parameters(role).values():
        parameter.requires_grad_(True)


def _figures(result: LoopResult) -> dict[str, Any]:
    facts = {"train_seconds": result.seconds, "train_tokens": float(result.tokens), "earlier_seconds": result.earlier}
    return {**facts, **result.figures}


@contextmanager
def _autocast(context: StageContext) -> Iterator[None]:
    kind = context.model.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=context.recipe.precision == "bf16"):
        yield


def check_text(recipe: Recipe, streams: Mapping[str, torch.Tensor]) -> None:
    """Refuse text too short to train and calibrate on, before any work is done.

    Args:
        recipe: Names the text and the length of a window.
        streams: int64 [tokens] of `train` and `calibration`.
    """
    for name in ("train", "calibration"):
        tokens = streams[name].numel()
        if tokens < recipe.seq_len:
            raise InputError(
                f"the {name} split of {recipe.data} has {tokens} tokens, less than one window of "
                f"{recipe.seq_len}; give more text or a shorter --seq-len"
            )


def prepare(context: StageContext) -> None:
    """Refuse adapters that the model has no place for; wait for the work folder; share the base where asked to."""
    if "lora" in context.recipe.stages:
        lora_config(context.model, context.recipe.lora)
    context.accelerator.wait_for_everyone()
    if sharding_wanted():
        shard_base(context.model)
