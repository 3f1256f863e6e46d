"""The dry run: two steps of every stage, from which the time, memory and disk space of a conversion are estimated."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from irc.conversion.memory import enough_memory, out_of_memory
from irc.conversion.pipeline import Conversion, capture_and_rewrite, fit_to_base, read_inputs, resolve
from irc.dtypes import BYTES
from irc.evaluation.perplexity import evaluate
from irc.model.checkpoint import find_base
from irc.model.modules import Router
from irc.model.own_text import own_text_file, sampling_seconds
from irc.progress import ProgressFactory, silent
from irc.recipe.recipe import Recipe
from irc.recipe.stages import batch_of, stage_named
from irc.runtime.environment import memory
from irc.text.source import OWN_TEXT
from irc.training.stages import STAGE_RUNNERS, StageContext

_STEPS = 2
_WINDOWS = 16  # calibration and evaluation read this many at once
_CALIBRATION_ROUNDS = 4  # setting the threshold takes up to eight
_COPIES_IN_CHECKPOINT = 3  # weights and two moments
_MIB = 2**20


def estimate_conversion(recipe: Recipe, output: Path, progress: ProgressFactory) -> dict[str, Any]:
    """Run two steps of every stage of a recipe and extrapolate; nothing is written.

    Args:
        recipe: Recipe of the conversion.
        output: Where the bundle would go.
        progress: Makes progress bars.

    Returns:
        `recipe` as resolved; `phases`, each with `name` and `seconds`; the sum `seconds`; and for `memory` and `disk`
        each `needed_mib`, `free_mib` and `fits`. Memory is the measured peak of this process (of the GPU, on CUDA).

    Raises:
        InputError: The recipe cannot be run.
        IrcError: A batch does not fit into memory.
    """
    recipe = resolve(recipe)
    base = find_base(recipe.model)
    fit_to_base(recipe, base)
    phases, data = [], recipe.data
    if OWN_TEXT in data and not own_text_file(base, recipe.self_tokens, recipe.self_seed).is_file():
        with enough_memory(recipe):
            seconds = sampling_seconds(base, recipe.self_tokens, recipe.self_seed, recipe.device)
        phases.append(("own text", seconds))
        recipe.data = ["stdlib" if text == OWN_TEXT else text for text in data]  # as good to measure time with
    with tempfile.TemporaryDirectory() as folder:
        conversion = Conversion(recipe, output, Path(folder), progress)
        conversion.base = base
        started = time.monotonic()
        read_inputs(conversion)
        phases.append(("text", time.monotonic() - started))
        free_memory = _free_memory(recipe.device)
        _refuse_huge_batches(conversion, free_memory)
        started = time.monotonic()
        with enough_memory(recipe):
            capture_and_rewrite(conversion)
            phases.append(("capture", time.monotonic() - started))
            phases += _stages(conversion)
            phases.append(("evaluate", _evaluation(conversion)))
    recipe.data = data
    return {
        "recipe": recipe.to_dict(),
        "phases": [{"name": name, "seconds": round(seconds, 1)} for name, seconds in phases],
        "seconds": round(sum(seconds for _, seconds in phases), 1),
        "memory": _room(_peak_memory(recipe.device) + _kept(conversion) / _MIB, free_memory),
        "disk": _room(_disk(conversion), shutil.disk_usage(_existing(output)).free / _MIB),
    }


def _room(needed: float, free: float) -> dict[str, Any]:
    return {"needed_mib": round(needed), "free_mib": round(free), "fits": needed <= free}


def _disk(conversion: Conversion) -> float:
    """Return the MiB that results and checkpoints of all stages take."""
    parameters = conversion.model.adapter_parameters("router", "forecaster").values()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    saved = 1 + len(conversion.recipe.stages) + _COPIES_IN_CHECKPOINT
    return weights * saved / _MIB


def _refuse_huge_batches(conversion: Conversion, free_memory: float) -> None:
    """Refuse batches whose hidden states, which every layer keeps for the backward pass, exceed the free memory."""
    recipe, config = conversion.recipe, conversion.base.config
    for stage in map(stage_named, recipe.stages):
        batch = batch_of(stage.settings_in(recipe))
        numbers = batch * recipe.train_window * config.hidden_size * config.num_hidden_layers
        states = numbers * BYTES[recipe.dtype] / _MIB
        if stage.through_layers and states > free_memory:
            details = f"{stage.name}.batch_size {batch} takes at least {states:,.0f} MiB, {free_memory:,.0f} are free"
            raise out_of_memory(recipe, details)


def _kept(conversion: Conversion) -> float:
    """Return the bytes that a stage keeps of the text that the dry run leaves out.

    Stage lff keeps two hidden states and a mask of every token. Teaching keeps what every router reads, in host memory
    even with a GPU.
    """
    recipe, model = conversion.recipe, conversion.model
    few = _with_few_steps(recipe)
    lff = taught = 0
    if "lff" in recipe.stages:
        states = 2 * model.config.hidden_size * model.dtype.itemsize
        lff = (recipe.lff.tokens - few.lff.tokens) * (states + recipe.train_window)
    if "router" in recipe.stages and recipe.device == "cpu":
        routers = [router for unit in model.units if isinstance(router := model.part(unit, "router"), Router)]
        all_tokens, few_tokens = (
            min(each.router.windows_taught(each.train_window) * each.train_window, conversion.streams["train"].numel())
            for each in (recipe, few)
        )
        numbers = sum(router.first.in_features for router in routers)
        taught = (all_tokens - few_tokens) * numbers * torch.bfloat16.itemsize
    return float(max(lff, taught))


def _stages(conversion: Conversion) -> Iterator[tuple[str, float]]:
    """Run the stages with few steps; yield the seconds that each would take with all its steps."""
    full = conversion.recipe
    few = _with_few_steps(full)
    context = StageContext(
        conversion.model, few, conversion.streams["train"], conversion.streams["calibration"], conversion.work, silent
    )
    for stage in full.stages:
        with conversion.progress(f"dry run of {stage}", 1) as bar:
            figures = STAGE_RUNNERS[stage](context)
            bar.update(1)
        settings, few_settings = (stage_named(stage).settings_in(recipe) for recipe in (full, few))
        yield stage, _extrapolated(figures, settings, few_settings, full, few)
    if full.others_on_dial:
        yield "dial", len(full.others_on_dial) * _threshold(figures, full.router, few.router)


def _with_few_steps(recipe: Recipe) -> Recipe:
    few = recipe.model_copy(deep=True)
    few.lff.steps = min(_STEPS, recipe.lff.steps)
    few.lff.tokens = min(recipe.lff.tokens, _WINDOWS * few.train_window)
    few.router.steps = min(_STEPS, recipe.router.steps)
    few.router.teach_steps = min(_STEPS, recipe.router.teach_steps)
    few.router.calibration_tokens = min(recipe.router.calibration_tokens, _WINDOWS * few.window)
    few.lora.steps = _STEPS
    return few


def _extrapolated(figures: dict[str, Any], full: Any, few: Any, recipe: Recipe, few_recipe: Recipe) -> float:
    """Return the seconds that a stage would take.

    Args:
        figures: What the stage measured with few steps.
        full: The stage's settings.
        few: Its settings in the dry run.
        recipe: The recipe; its stage router sets the threshold after every stage that routes.
        few_recipe: That of the dry run.
    """
    seconds = figures.get("choice_seconds", 0.0)
    if "closed_form_seconds" in figures:
        seconds += figures["closed_form_seconds"] * full.tokens / few.tokens
    if few.steps:
        seconds += figures.get("refine_seconds", figures.get("train_seconds", 0.0)) * full.steps / few.steps
    if "teach_seconds" in figures:
        windows, few_windows = (each.router.windows_taught(each.train_window) for each in (recipe, few_recipe))
        seconds += figures["teach_seconds"] * windows / few_windows
    if "calibration_seconds" in figures:
        seconds += _threshold(figures, recipe.router, few_recipe.router)
    return float(seconds)


def _threshold(figures: dict[str, Any], router: Any, few_router: Any) -> float:
    """Return the seconds that setting a threshold would take."""
    per_round = figures["calibration_seconds"] / figures["calibration_rounds"]
    return float(_CALIBRATION_ROUNDS * per_round * router.calibration_tokens / few_router.calibration_tokens)


def _evaluation(conversion: Conversion) -> float:
    """Return the seconds of the closing evaluation on all texts, from one batch of it."""
    some = conversion.heldout[:_WINDOWS]
    started = time.monotonic()
    with silent("", 1) as bar:
        evaluate(conversion.model, some, bar)
    tokens = conversion.heldout.numel() + sum(text.windows.numel() for text in conversion.further)
    return (time.monotonic() - started) * tokens / some.numel()


def _peak_memory(device: str) -> float:
    """Return the most MiB that this process has taken so far, of the GPU on CUDA."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / _MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _free_memory(device: str) -> float:
    """Return the MiB that this process may take, including what it already has."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0] / _MIB
    total, available = memory()
    try:
        held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        held = 0
    return ((total or 0) if available is None else available + held) / _MIB


def _existing(path: Path) -> Path:
    """Return a path or the nearest of its parents that exists."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
