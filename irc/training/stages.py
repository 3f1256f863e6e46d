"""Runs the stages: `lff` fits forecasters, `router` teaches routers and trains forecasters, `lora` adapts."""

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
from irc.model.flops import flops_range
from irc.model.modules import Forecaster, Router
from irc.model.paging import released
from irc.model.routed import RoutedForCausalLM
from irc.progress import Progress, ProgressFactory
from irc.recipe.policies import policy_named
from irc.recipe.recipe import Recipe
from irc.recipe.stages import StageName, batch_of
from irc.text.source import pick, windows
from irc.training.budget import Budget, flops_budget, plain_budget
from irc.training.calibrate import reached, set_threshold
from irc.training.closed_form import gather_statistics, set_closed_form
from irc.training.layerwise import layer_by_layer, outermost
from irc.training.loop import LoopResult, LoopSettings, Objective, accelerator_for, train
from irc.training.lora import inject_lora, lora_config, lora_parameters
from irc.training.objectives import ForecastObjective, RoutingObjective
from irc.training.recompute import recomputing
from irc.training.sharding import shard_base, sharding_wanted
from irc.training.static_depth import drop_units
from irc.training.teaching import teach_routers

log = logging.getLogger(__name__)

_EVAL_BATCH = 16
_RISE = 0.2  # part of a taught router stage in which rates rise: closed forms are better than Adam's first steps


@dataclass
class StageContext:
    """What every stage needs.

    Attributes:
        model: Rewritten model, changed in place.
        recipe: Resolved recipe.
        train_stream: Train split, int64 [tokens].
        calibration_stream: Calibration split, int64 [tokens].
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
        """The accelerator for this run's device and precision."""
        return accelerator_for(self.recipe.device, self.recipe.precision)

    def settings(self, stage: str, steps: int, batch_size: int, floor: float, rise: float = 0.0) -> LoopSettings:
        """Return the loop settings of a stage: rates rise for a share of the steps and fall to `floor`."""
        return LoopSettings(
            steps=steps,
            batch_size=batch_size,
            schedule=cosine_schedule(floor, rise),
            seed=self.recipe.seed,
            checkpoint=self.work / f"{stage}.checkpoint.safetensors",
            checkpoint_seconds=self.recipe.checkpoint_seconds,
        )

    def train(self, objective: Objective, settings: LoopSettings, progress: Progress) -> LoopResult:
        """Train an objective on the train split."""
        with recomputing(self.model, self.recipe.activation_checkpointing and objective.through_layers):
            return train(objective, self.train_windows(), settings, progress, self.accelerator)

    def train_windows(self) -> torch.Tensor:
        """Return the windows of the train split, int64 [windows, length]."""
        return windows(self.train_stream, self.recipe.train_window, "train split")

    def calibration_windows(self) -> torch.Tensor:
        """Return the windows of the calibration split that set the threshold, int64 [windows, length]."""
        text = windows(self.calibration_stream, self.recipe.window, "calibration split")
        return pick(text, self.recipe.router.calibration_tokens)


def cosine_schedule(floor: float, rise: float = 0.0) -> Callable[[float], float]:
    """Return a schedule whose factor falls from 1 to `floor` along a cosine as progress goes from 0 to 1.

    With `rise`, a share of the progress, it rises linearly from a tenth for so long and is multiplied by the cosine.
    """

    def factor(progress: float) -> float:
        falling = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return falling * min(1.0, 0.1 + 0.9 * progress / rise) if rise else falling

    return factor


def run_lff(context: StageContext) -> dict[str, Any]:
    """Fit all forecasters in closed form, then refine them by gradient descent.

    Returns:
        `closed_form_seconds` and `tokens`. With refinement also `refine_seconds`, `cosine` (the mean on the last batch)
        and `earlier_seconds` (wall-clock and processor time of earlier runs).
    """
    recipe = context.recipe.lff
    settings = context.settings("lff", max(1, recipe.steps), batch_of(recipe), 0.0)
    seconds, cpu_started = 0.0, time.process_time()
    if not settings.checkpoint.exists():
        seconds = fit_closed_form(context, context.train_windows())
        settings.time_before = (seconds, time.process_time() - cpu_started)
    figures: dict[str, Any] = {"closed_form_seconds": seconds, "tokens": float(recipe.tokens)}
    if recipe.steps:
        context.model.requires_grad_(False)
        objective = ForecastObjective(context.model, recipe.lr)
        _enable_gradients(context.model, "forecaster")
        blocks = outermost({unit.block for unit in context.model.units})
        # No gradient flows through a layer, so its weights are not needed again in this step.
        with released(context.model.graph, blocks), context.progress("lff", recipe.steps) as progress:
            result = context.train(objective, settings, progress)
        figures |= {
            "refine_seconds": result.seconds,
            "cosine": result.figures["cosine"],
            "earlier_seconds": result.earlier_runs,
        }
    return figures


def fit_closed_form(context: StageContext, text: torch.Tensor) -> float:
    """Stream text through the dense model once, layer by layer, and fit every forecaster in closed form.

    Args:
        context: The model and recipe.
        text: int64 [windows, length].

    Returns:
        Seconds taken.
    """
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
            with gather_statistics(model, units=units) as statistics:
                compute(advance)
            for unit in units:
                forecaster = model.part(unit, "forecaster")
                assert isinstance(forecaster, Forecaster)
                set_closed_form(forecaster, statistics[unit.name], forecaster.down.out_features, recipe.lff.ridge)
    return time.monotonic() - started


def run_router(context: StageContext) -> dict[str, Any]:
    """Train the routers, and the forecasters with them if the recipe says so, then set the decision threshold.

    Returns:
        Figures of the loop and of the calibration (see `irc.training.calibrate.calibrate`).
    """
    recipe = context.recipe.router
    model = context.model
    policy = policy_named(context.recipe.policy)
    budget = _budget(context)
    chosen = _choose_units(context, budget) if policy.whole_units else None
    model.requires_grad_(False)
    taught = _teach(context, budget)
    for unit in model.units if recipe.start else ():
        router = model.part(unit, "router")
        if isinstance(router, Router):
            router.shift(recipe.start)  # a checkpoint, loaded later, includes the shift and overwrites this
    objective = RoutingObjective(model, recipe, budget, context.recipe.seed, recipe.steps)
    if objective.sampled:
        _enable_gradients(model, "router")
    if recipe.forecaster_lr > 0:
        _enable_gradients(model, "forecaster")
    forecasters_learn = recipe.forecaster_lr > 0 and bool(model.adapter_parameters("forecaster"))
    if not (recipe.steps and (objective.sampled or forecasters_learn)):
        taught.pop("teach_cpu_seconds", None)
        return {**taught, **(chosen or _threshold(context, budget))}
    settings = context.settings("router", recipe.steps, batch_of(recipe), 0.1, _RISE if taught else 0.0)
    if taught:
        settings.time_before = (taught["teach_seconds"], taught.pop("teach_cpu_seconds"))
    with context.progress("router", recipe.steps) as progress:
        result = context.train(objective, settings, progress)
    objective.fold_threshold()
    return {**taught, **_figures(result), **(chosen or _threshold(context, budget))}


def _choose_units(context: StageContext, budget: Budget) -> dict[str, Any]:
    """Choose the units that a policy of whole units skips; return the figures of `drop_units` and the seconds taken."""
    started, text = time.monotonic(), context.calibration_windows()
    figures = drop_units(context.model, text, budget.sparsity, budget.weights if budget.flops else None)
    return {
        "importance": figures["importance"],
        "choice_seconds": time.monotonic() - started,
        **reached(figures["calibration_keep"], budget),
    }


def _teach(context: StageContext, budget: Budget) -> dict[str, float]:
    """Teach the routers the cost of forecasting, unless training has begun already; return the seconds taken."""
    recipe = context.recipe.router
    if recipe.teach_steps <= 0:
        return {}
    if (context.work / "router.checkpoint.safetensors").exists():
        return {"teach_seconds": 0.0, "teach_cpu_seconds": 0.0}
    started, cpu_started = time.monotonic(), time.process_time()
    text, sampled = context.train_windows(), recipe.settled().noise != 0
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(context.recipe.seed))
    chosen = text[order[: recipe.windows_taught(context.recipe.train_window)]]
    batches = chosen.split(batch_of(recipe))
    with context.progress("teach", len(batches) + 1) as progress, _autocast(context):
        teach_routers(context.model, batches, budget, context.recipe.seed, progress, sampled)
    return {
        "teach_seconds": time.monotonic() - started,
        "teach_cpu_seconds": time.process_time() - cpu_started,
    }


def run_lora(context: StageContext) -> dict[str, Any]:
    """Train LoRA adapters on the base's linears while tokens are routed, then set the threshold again.

    Returns:
        Figures of the loop and of the calibration (see `irc.training.calibrate.calibrate`).
    """
    recipe = context.recipe.lora
    model = context.model
    model.requires_grad_(False)
    inject_lora(model, recipe, context.recipe.seed)
    groups = [{"params": lora_parameters(model), "lr": recipe.lr}]
    learns = policy_named(context.recipe.policy).learns
    for role, rate in (("forecaster", recipe.forecaster_lr), ("router", recipe.router_lr if learns else 0.0)):
        if rate > 0 and model.adapter_parameters(role):
            _enable_gradients(model, role)
            groups.append({"params": model.adapter_parameters(role), "lr": rate})
    budget = _budget(context)
    objective = RoutingObjective(
        model,
        context.recipe.router,
        budget,
        context.recipe.seed,
        recipe.steps,
        lora=groups,
        sampled=learns and recipe.router_lr > 0,
    )
    settings = context.settings("lora", recipe.steps, batch_of(recipe), 0.0)
    with context.progress("lora", recipe.steps) as progress:
        result = context.train(objective, settings, progress)
    objective.fold_threshold()
    return {**_figures(result), **_threshold(context, budget)}


STAGE_RUNNERS: dict[StageName, Callable[[StageContext], dict[str, Any]]] = {
    "lff": run_lff,
    "router": run_router,
    "lora": run_lora,
}
"""The function that runs each stage of `irc.recipe.stages.STAGES`; it returns the stage's figures."""


def _threshold(context: StageContext, budget: Budget) -> dict[str, Any]:
    return set_threshold(context.model, context.calibration_windows(), budget, context.progress)


def _budget(context: StageContext) -> Budget:
    recipe, model = context.recipe, context.model
    if recipe.flops is not None:
        return flops_budget(flops_range(model, recipe.window), recipe.flops)
    return plain_budget([unit.name for unit in model.units], recipe.sparsity)


def _enable_gradients(model: RoutedForCausalLM, role: str) -> None:
    for parameter in model.adapter_parameters(role).values():
        parameter.requires_grad_(True)


def _figures(result: LoopResult) -> dict[str, Any]:
    return {
        "train_seconds": result.seconds,
        "train_tokens": float(result.tokens),
        "earlier_seconds": result.earlier_runs,
        **result.figures,
    }


@contextmanager
def _autocast(context: StageContext) -> Iterator[None]:
    kind = context.model.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=context.recipe.precision == "bf16"):
        yield


def check_text(recipe: Recipe, streams: Mapping[str, torch.Tensor]) -> None:
    """Refuse text that is too short to train and calibrate on, before any work is done.

    Args:
        recipe: Names the text and the lengths of windows.
        streams: Splits `train` and `calibration`, int64 [tokens].

    Raises:
        InputError: A split does not fill one window.
    """
    train = "seq_len" if recipe.train_window == recipe.window else "train_seq_len"
    for name, window, field in (("train", recipe.train_window, train), ("calibration", recipe.window, "seq_len")):
        tokens = streams[name].numel()
        if tokens < window:
            raise InputError(
                f"the {name} split of {recipe.data_name} has {tokens} tokens, which do not fill one window of "
                f"{window}; give more text or a smaller {field}",
                options=("data", field),
            )


def prepare(context: StageContext) -> None:
    """Prepare the processes of this run for training.

    Checks the LoRA targets, waits until all processes see the work folder, and shards the base if FSDP was asked for.

    Raises:
        InputError: The model has no linear that the recipe wants to adapt, or the FSDP version is not supported.
    """
    if "lora" in context.recipe.stages:
        lora_config(context.model, context.recipe.lora)
    context.accelerator.wait_for_everyone()
    if sharding_wanted():
        shard_base(context.model)
