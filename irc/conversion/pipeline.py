"""convert(): the whole way of a model, phase by phase. The list of phases is `PHASES`; read it first."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from irc.bundle.card import model_card
from irc.bundle.key_policy import KeyPolicy, set_key_policy
from irc.bundle.loading import check_replaceable, write_bundle
from irc.conversion.memory import enough_memory
from irc.conversion.resume import check_same_inputs, finished, located
from irc.conversion.stage_cache import StageCache
from irc.conversion.work_folder import (
    drop,
    held,
    is_main_process,
    load_stage,
    save_stage,
    stage_figures,
    work_folder,
)
from irc.devices import find_device
from irc.dtypes import short_name
from irc.errors import InputError, IrcError
from irc.evaluation.figures import result_metrics
from irc.evaluation.perplexity import Evaluation, evaluate
from irc.files.atomic import check_place, staged
from irc.model.build import build_routed
from irc.model.checkpoint import BaseModel, find_base
from irc.model.routed import RoutedForCausalLM, RoutingSpec
from irc.progress import ProgressFactory, silent
from irc.recipe.policies import policy_named
from irc.recipe.recipe import Recipe, text_name
from irc.text.source import Split, TextSource, load_text, pick, token_stream, windows
from irc.training.calibrate import dial_points
from irc.training.sharding import check_batches, own_device
from irc.training.stages import StageContext, check_text, prepare, run_lff, run_lora, run_router

log = logging.getLogger(__name__)

STAGE_RUNNERS = {"lff": run_lff, "router": run_router, "lora": run_lora}


@dataclass
class Conversion:
    """What the phases hand on.

    Attributes:
        recipe: Resolved: once the inputs are read, no `auto` is left in it.
        output: Where the bundle goes.
        work: Folder beside it with the stages' checkpoints and results.
        progress: Makes progress bars.
        stages: Folder of finished stages to take and to leave, None for none.
        base: The base model.
        text: The text.
        model: The rewritten model.
        heldout: Windows of the closing evaluation: held out, or of the validation split.
        seconds: Time of every phase.
        stage_figures: What every stage measured.
        keep: Share of the calibration text that each unit executes.
        dial: Thresholds of other sparsities.
    """

    recipe: Recipe
    output: Path
    work: Path
    progress: ProgressFactory
    stages: Path | None = None
    base: BaseModel = field(init=False)
    text: TextSource = field(init=False)
    model: RoutedForCausalLM = field(init=False)
    streams: dict[str, torch.Tensor] = field(default_factory=dict)
    heldout: torch.Tensor = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)
    stage_figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    keep: dict[str, float] = field(default_factory=dict)
    dial: list[dict[str, Any]] = field(default_factory=list)
    evaluation: Evaluation = field(init=False)
    metrics: dict[str, Any] = field(default_factory=dict)


def convert(
    recipe: Recipe,
    output: Path,
    progress: ProgressFactory,
    *,
    force: bool = False,
    resume: bool = False,
    stages: Path | None = None,
) -> dict[str, Any]:
    """Convert a model into a bundle.

    Args:
        recipe: What to do.
        output: Folder of the bundle; the work in progress lies beside it in `OUTPUT.partial`.
        progress: Makes progress bars, of the first of several processes.
        force: Replace what is at `output`, and drop unfinished work.
        resume: Continue unfinished work; a finished bundle is returned as it is.
        stages: Folder of finished stages: one that was trained in just the same way is taken from there, a new one
            is left there (see `irc.conversion.stage_cache`).

    Returns:
        The metrics, as written to metrics.json.
    """
    recipe = resolve(recipe)
    check_place(output)
    if resume and (output / "metrics.json").is_file() and not work_folder(output).exists():
        measured = finished(recipe, output)
        drop(work_folder(output))  # what a killed removal left
        return measured
    check_replaceable(output)
    if output.exists() and not force and not resume:
        raise InputError(f"{output}: exists already; --force replaces it, --resume continues it")
    seen = progress if is_main_process() else silent
    conversion = Conversion(recipe, output, work_folder(output), seen, stages)
    check_batches(recipe, {stage for stage in recipe.stages if resume and stage_figures(conversion.work, stage)})
    read_inputs(conversion)
    with held(conversion.work, recipe, force=force, resume=resume):
        if is_main_process():
            check_same_inputs(conversion.work, conversion.base, conversion.text)
        for name, phase in PHASES:
            started = time.monotonic()
            with enough_memory(recipe):
                phase(conversion)
            conversion.seconds[name] = time.monotonic() - started
            log.debug("phase %s ended after %.1f s", name, conversion.seconds[name])
        finish(conversion)
    return conversion.metrics


def resolve(recipe: Recipe) -> Recipe:
    """Check a recipe and replace every `auto` that does not depend on the base by what it means on this machine."""
    recipe.check()
    policy = policy_named(recipe.policy)
    recipe.stages = recipe.stages or policy.stages
    if recipe.router.teach_steps < 0 or not policy.learns:
        # What is taught is the cost of a forecast while the rest executes: no guide where most is skipped.
        recipe.router.teach_steps = policy.teach_steps if recipe.sparsity <= 0.5 else 0
    recipe.device = find_device(recipe.device)
    own_device(recipe.device)
    if recipe.precision == "auto":
        fast = recipe.device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
        recipe.precision = "bf16" if fast else "fp32"
    return recipe


def read_inputs(conversion: Conversion) -> None:
    """Read base and text, and refuse bad input before any work is done."""
    recipe = conversion.recipe
    base = conversion.base = find_base(recipe.model)
    recipe.rank = recipe.rank_for(base.config.hidden_size)
    if "lora" in recipe.stages and recipe.lora.rank > base.config.hidden_size:
        width = base.config.hidden_size
        raise InputError(f"lora.rank is {recipe.lora.rank}, the model's hidden size is {width}; give at most {width}")
    _ = base.shards
    recipe.dtype = short_name(base.dtype("auto")) if recipe.dtype == "auto" else recipe.dtype
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit and recipe.seq_len > limit:
        raise InputError(f"seq_len is {recipe.seq_len}, the model's context is {limit}; give a shorter --seq-len")
    conversion.text = load_text(recipe.data)
    for split in ("train", "calibration", recipe.eval_split):
        conversion.streams[split] = token_stream(conversion.text.split(cast(Split, split)), base.tokenizer)
    check_text(recipe, conversion.streams)
    vocabulary = base.config.vocab_size
    largest = max(int(stream.max()) for stream in conversion.streams.values() if stream.numel())
    if largest >= vocabulary:
        raise InputError(
            f"{recipe.model}: its tokenizer yields id {largest}, the model's vocabulary ends at {vocabulary - 1}"
        )
    conversion.heldout = pick(
        windows(conversion.streams[recipe.eval_split], recipe.seq_len, f"{recipe.eval_split} split"),
        recipe.eval_tokens,
    )


def capture_and_rewrite(conversion: Conversion) -> None:
    """Capture the base and insert untrained forecasters, routers and muxes."""
    recipe = conversion.recipe
    conversion.base.check_finite()
    spec = RoutingSpec(recipe.rank, recipe.forecaster, recipe.policy, recipe.sparsity, recipe.seed, recipe.router.reads)
    conversion.model = build_routed(conversion.base, spec, recipe.dtype, recipe.device, recipe.seed)
    conversion.model.facts["base"] = conversion.base


def run_stages(conversion: Conversion) -> None:
    """Run every stage that is not finished, each from the result of the one before."""
    recipe, work = conversion.recipe, conversion.work
    train, calibration = conversion.streams["train"], conversion.streams["calibration"]
    context = StageContext(conversion.model, recipe, train, calibration, work, conversion.progress)
    prepare(context)
    cache = None
    if conversion.stages is not None:
        cache = StageCache(conversion.stages, conversion.base.identity(), conversion.text.fingerprint())
    for stage in recipe.stages:
        figures = stage_figures(work, stage)
        if figures is None and cache is not None and cache.fetch(recipe, stage, work):
            figures = stage_figures(work, stage)
        if figures is None:
            started, worked = time.monotonic(), time.process_time()
            figures = STAGE_RUNNERS[stage](context)
            before = figures.pop("earlier_seconds", (0.0, 0.0))  # runs of this stage that were killed
            figures["seconds"] = before[0] + time.monotonic() - started
            figures["cpu_seconds"] = before[1] + time.process_time() - worked
            if is_main_process():
                save_stage(conversion.model, work, stage, figures)
                if cache is not None:
                    cache.store(recipe, stage, work)
        else:
            load_stage(conversion.model, work, stage, recipe)
        conversion.stage_figures[stage] = figures
        conversion.seconds[stage] = figures["seconds"]
        log.debug("phase %s ended after %.1f s", stage, figures["seconds"])
    keep = conversion.keep = conversion.stage_figures[recipe.stages[-1]].pop("calibration_keep")
    if recipe.dial:
        conversion.dial = dial_points(conversion.model, context.calibration_windows(), recipe.dial, conversion.progress)
    set_key_policy(conversion.model, KeyPolicy(recipe.kv_policy, recipe.kv_threshold), keep)


def evaluate_heldout(conversion: Conversion) -> None:
    """Measure the result on held-out text."""
    with conversion.progress(text_name(conversion.recipe.eval_split), len(conversion.heldout)) as progress:
        conversion.evaluation = evaluate(conversion.model, conversion.heldout, progress)


PHASES = (
    ("capture", capture_and_rewrite),
    ("stages", run_stages),
    ("evaluate", evaluate_heldout),
)


def finish(conversion: Conversion) -> None:
    """Write the bundle whole, and drop the work folder."""
    conversion.metrics = metrics_of(conversion)
    if not is_main_process():
        return
    try:
        with staged(conversion.output) as staging:
            recipe = located(conversion.recipe).to_dict()
            card = model_card(conversion.metrics, conversion.recipe)
            write_bundle(conversion.model, staging, conversion.metrics, recipe, card, conversion.dial)
    except IrcError as error:
        said = str(error).removesuffix("; give another --output")
        raise type(error)(f"{said}; then --resume finishes it, with the same --output: the work is kept") from error
    drop(conversion.work)


def metrics_of(conversion: Conversion) -> dict[str, Any]:
    """Return the metrics of a finished conversion (keys as in docs/json.md)."""
    result = conversion.evaluation
    seconds = {name: round(value, 2) for name, value in conversion.seconds.items() if name != "stages"}
    return {
        "model": conversion.recipe.model,
        "data": {
            "name": conversion.text.name,
            "fingerprint": conversion.text.fingerprint(),
            "split": conversion.recipe.eval_split,
            "tokens": result.tokens,
            "seq_len": conversion.recipe.seq_len,
        },
        **result_metrics(conversion.model, result, conversion.recipe.sparsity),
        "calibration_keep": conversion.keep,
        "seconds": seconds,
        "stages": conversion.stage_figures,
        "output": str(conversion.output),
    }


__all__ = ["PHASES", "Conversion", "convert", "metrics_of", "resolve"]
