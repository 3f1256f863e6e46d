"""rehearse(): a few steps of every stage, to say beforehand what a conversion takes and whether it fits."""

from __future__ import annotations

import copy
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from irc.conversion.memory import enough_memory, less_of_it
from irc.conversion.pipeline import STAGE_RUNNERS, Conversion, capture_and_rewrite, read_inputs, resolve
from irc.dtypes import BYTES
from irc.errors import IrcError
from irc.evaluation.perplexity import evaluate
from irc.progress import ProgressFactory, silent
from irc.recipe.recipe import Recipe
from irc.training.stages import StageContext

_STEPS = 2
_WINDOWS = 16  # as many as calibration and evaluation read at once
_ROUNDS = 4  # of the threshold, which may take up to eight
_ADAM = 3  # a checkpoint holds weights and two moments


def rehearse(recipe: Recipe, output: Path, progress: ProgressFactory) -> dict[str, Any]:
    """Run two steps of every stage of a recipe and reckon with the rest; nothing is written.

    Args:
        recipe: What is to be done.
        output: Where the bundle would go.
        progress: Makes progress bars.

    Returns:
        `recipe` as resolved, `phases` with `name` and `seconds`, `seconds` in all, and for `memory` and `disk` each
        `needed_mib`, `free_mib` and `fits`. Memory is the measured peak of this process (of the GPU, on CUDA).

    Raises:
        InputError: The recipe cannot be run.
    """
    recipe = resolve(recipe)
    with tempfile.TemporaryDirectory() as folder:
        conversion = Conversion(recipe, output, Path(folder), progress)
        read_inputs(conversion)
        free = _free_memory(recipe.device)
        _refuse_hopeless(conversion, free)
        started = time.monotonic()
        with enough_memory(recipe):
            capture_and_rewrite(conversion)
            phases = [
                ("capture", time.monotonic() - started),
                *_stages(conversion),
                ("evaluate", _evaluate(conversion)),
            ]
    weights = sum(
        p.numel() * p.element_size() for p in conversion.model.adapter_parameters("router", "forecaster").values()
    )
    stages = 1 + len(recipe.stages)
    needed = {"memory": _peak(recipe.device) + _states(conversion) / 2**20, "disk": weights * (stages + _ADAM) / 2**20}
    found = {"memory": free, "disk": shutil.disk_usage(_existing(output)).free / 2**20}
    return {
        "recipe": recipe.to_dict(),
        "phases": [{"name": name, "seconds": round(seconds, 1)} for name, seconds in phases],
        "seconds": round(sum(seconds for _, seconds in phases), 1),
        **{
            kind: {
                "needed_mib": round(needed[kind]),
                "free_mib": round(found[kind]),
                "fits": needed[kind] <= found[kind],
            }
            for kind in needed
        },
    }


def _refuse_hopeless(conversion: Conversion, free: float) -> None:
    """Refuse batches whose states alone, that every layer keeps for the backward pass, take more than there is."""
    recipe, config = conversion.recipe, conversion.base.config
    for stage in ("router", "lora"):
        batch = getattr(recipe, stage).batch_size
        states = batch * recipe.seq_len * config.hidden_size * config.num_hidden_layers * BYTES[recipe.dtype] / 2**20
        if stage in recipe.stages and states > free:
            raise IrcError(
                f"{recipe.model}: does not fit into memory: {stage}.batch_size {batch} takes {states:,.0f} MiB at "
                f"least, {free:,.0f} are free; {less_of_it(recipe)}"
            )


def _states(conversion: Conversion) -> float:
    """Return the bytes that the stage lff keeps of the text which the rehearsal leaves out: two states, a mask."""
    recipe, model = conversion.recipe, conversion.model
    left_out = max(0, recipe.lff.tokens - _WINDOWS * recipe.seq_len) if "lff" in recipe.stages else 0
    return float(left_out * (2 * model.config.hidden_size * model.dtype.itemsize + recipe.seq_len))


def _stages(conversion: Conversion) -> Iterator[tuple[str, float]]:
    """Run the stages with few steps; yield what each would take with all of its own."""
    full = conversion.recipe
    few = copy.deepcopy(full)
    window = few.seq_len
    few.lff.steps, few.router.steps, few.lora.steps = min(_STEPS, full.lff.steps), _STEPS, _STEPS
    few.router.teach_steps = min(_STEPS, full.router.teach_steps)
    few.lff.tokens = min(full.lff.tokens, _WINDOWS * window)
    few.router.calibration_tokens = min(full.router.calibration_tokens, _WINDOWS * window)
    context = StageContext(
        conversion.model, few, conversion.streams["train"], conversion.streams["calibration"], conversion.work, silent
    )
    for stage in full.stages:
        with conversion.progress(f"rehearsal of {stage}", 1) as bar:
            figures = STAGE_RUNNERS[stage](context)
            bar.update(1)
        yield stage, _whole(figures, getattr(full, stage), getattr(few, stage), full.router, few.router)


def _whole(figures: dict[str, Any], full: Any, few: Any, router: Any, few_router: Any) -> float:
    """Return the seconds that a stage would take, from what its rehearsal measured."""
    seconds = 0.0
    if "closed_form_seconds" in figures:
        seconds += figures["closed_form_seconds"] * full.tokens / few.tokens
    if few.steps:
        seconds += figures.get("refine_seconds", figures.get("train_seconds", 0.0)) * full.steps / few.steps
    if "calibration_seconds" in figures:
        a_round = figures["calibration_seconds"] / figures["calibration_rounds"]
        seconds += _ROUNDS * a_round * router.calibration_tokens / few_router.calibration_tokens
    return float(seconds)


def _evaluate(conversion: Conversion) -> float:
    """Return the seconds of the closing evaluation, from one batch of it."""
    some = conversion.heldout[:_WINDOWS]
    started = time.monotonic()
    with silent("", 1) as bar:
        evaluate(conversion.model, some, bar)
    return (time.monotonic() - started) * len(conversion.heldout) / len(some)


def _peak(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _free_memory(device: str) -> float:
    """Return the MiB that this process may take, what it has included."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0] / 2**20
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024
        held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    return available + held


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
