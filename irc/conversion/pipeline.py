"""convert(): the whole conversion of a model, phase by phase. Start with `PHASES`, the list of phases."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from irc.bundle.card import model_card
from irc.bundle.config import DialPoint
from irc.bundle.key_policy import set_key_policy
from irc.bundle.layout import METRICS
from irc.bundle.saving import check_replaceable, write_bundle
from irc.conversion.memory import enough_memory
from irc.conversion.resume import check_same_inputs, finished_metrics, with_absolute_paths
from irc.conversion.stage_cache import StageCache
from irc.conversion.work_folder import (
    load_stage,
    open_work_folder,
    refuse_other_work,
    remove_work,
    save_stage,
    stage_figures,
    work_folder,
)
from irc.devices import find_device
from irc.dtypes import short_name
from irc.errors import InputError
from irc.evaluation.figures import result_metrics
from irc.evaluation.perplexity import Evaluation, evaluate
from irc.evaluation.texts import NamedText, further_texts, measure_texts
from irc.files.atomic import check_place, staged
from irc.model.build import build_routed, set_share
from irc.model.checkpoint import BaseModel, find_base
from irc.model.flops import flops_range
from irc.model.own_text import check_own_text, own_text_file, texts_of
from irc.model.routed import RoutedForCausalLM, RoutingSpec
from irc.progress import ProgressFactory, place, silent
from irc.recipe.key_policy import KeyPolicy
from irc.recipe.policies import policy_named
from irc.recipe.recipe import Recipe, text_name
from irc.recipe.stages import StageName, required_stages, tokens_to_read
from irc.text.mixture import Mixture
from irc.text.source import OWN_TEXT, pick, windows
from irc.training.budget import flops_budget
from irc.training.calibrate import dial_points
from irc.training.processes import group, is_main_process
from irc.training.sharding import check_batches, own_device, settle_batches
from irc.training.stages import STAGE_RUNNERS, StageContext, check_text, prepare

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5


@dataclass
class Conversion:
    """What the phases pass on.

    Attributes:
        recipe: Resolved; after the inputs are read, it contains no `auto`.
        output: Where the bundle goes.
        work: Folder beside it with the stages' checkpoints and results.
        progress: Makes progress bars.
        stage_cache_folder: Folder of finished stages to reuse and to add to, None for none.
        also: Further texts to measure on, each `NAME=TEXT`.
        base: The base model.
        text: The text.
        model: The rewritten model.
        streams: Tokens of each split, int64 [tokens].
        heldout: Windows of the closing evaluation, int64 [windows, tokens]: held out, or of the validation split.
        seconds: Time of every phase.
        stage_figures: What every stage measured.
        keep: Share of the calibration text that each unit executes.
        dial: Thresholds of the own target and of others.
        further: The yardstick and the user's further texts.
        evaluation: Result of the closing evaluation.
        texts: What was measured on each further text.
        metrics: What metrics.json holds.
    """

    recipe: Recipe
    output: Path
    work: Path
    progress: ProgressFactory
    stage_cache_folder: Path | None = None
    also: Sequence[str] = ()
    base: BaseModel = field(init=False)
    text: Mixture = field(init=False)
    model: RoutedForCausalLM = field(init=False)
    streams: dict[str, torch.Tensor] = field(default_factory=dict)
    heldout: torch.Tensor = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)
    stage_figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    keep: dict[str, float] = field(default_factory=dict)
    dial: tuple[DialPoint, ...] = ()
    further: list[NamedText] = field(default_factory=list)
    evaluation: Evaluation = field(init=False)
    texts: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


def convert(
    recipe: Recipe,
    output: Path,
    progress: ProgressFactory,
    *,
    force: bool = False,
    resume: bool = False,
    stage_cache_folder: Path | None = None,
    base: BaseModel | None = None,
    also: Sequence[str] = (),
) -> dict[str, Any]:
    """Convert a model into a bundle.

    Args:
        recipe: What to do.
        output: Folder of the bundle. Work in progress is beside it, in `OUTPUT.partial`.
        progress: Makes progress bars; only the first of several processes uses it.
        force: Replace what is at `output`, and discard unfinished work.
        resume: Continue unfinished work. A finished bundle is left as it is.
        stage_cache_folder: Folder of finished stages: identical ones are reused from it and new ones are stored in it
            (see `irc.conversion.stage_cache`).
        base: The recipe's model, if the caller has opened it, so that its weights are hashed once.
        also: Further texts to measure the result on, each `NAME=TEXT`; nothing is trained or chosen on them.

    Returns:
        The metrics, as written to metrics.json.

    Raises:
        InputError: The recipe, the model or the text cannot be used, or something else is at `output`.
        Interrupted: Ctrl-C stopped the conversion after it had work to resume.
        IrcError: Memory or disk space ran out. The finished work stays, to be resumed.
    """
    recipe = resolve(recipe)
    check_place(output)
    work = work_folder(output)
    if resume and (output / METRICS).is_file() and not work.exists():
        metrics = finished_metrics(recipe, output, base or find_base(recipe.model), progress)
        remove_work(work)  # a killed removal may have left some
        return metrics
    check_replaceable(output)
    if output.exists() and not force and not resume:
        raise InputError(f"{output}: exists already; replace it or resume it", options=("force", "resume"))
    visible_progress = progress if is_main_process() else silent
    conversion = Conversion(recipe, output, work, visible_progress, stage_cache_folder, also)
    check_batches(recipe, {stage for stage in recipe.stages if resume and stage_figures(work, stage)})
    conversion.base = base or find_base(recipe.model)
    fit_to_base(recipe, conversion.base)
    refuse_other_work(work, recipe, force=force, resume=resume)  # before text is sampled, which takes minutes
    with enough_memory(recipe):
        read_inputs(conversion)
    with open_work_folder(work, recipe, force=force, resume=resume):
        if is_main_process():
            check_same_inputs(work, conversion.base, conversion.text)
        for name, phase in PHASES:
            started = time.monotonic()
            with enough_memory(recipe), place(f"phase {name}"):
                phase(conversion)
            conversion.seconds[name] = time.monotonic() - started
            log.debug("phase %s ended after %.1f s", name, conversion.seconds[name])
        finish(conversion)
    return conversion.metrics


def resolve(recipe: Recipe) -> Recipe:
    """Return a checked copy of a recipe without any `auto` that does not depend on the base.

    Raises:
        InputError: Fields of the recipe do not go together, or its device is not available.
    """
    recipe = recipe.validated()
    policy = policy_named(recipe.policy)
    recipe.stages = recipe.stages or required_stages(policy)
    if recipe.router.teach_steps < 0 or not policy.learns:
        # Teaching measures the cost of one forecast while the rest executes, which says little if most is skipped.
        few_skipped = recipe.sparsity <= 0.5 if recipe.flops is None else recipe.flops >= 0.6
        recipe.router.teach_steps = policy.teach_steps if few_skipped else 0
    recipe.router = recipe.router.settled()
    if recipe.router.hidden == 1 and recipe.router.teach_steps:
        raise InputError(
            "router.hidden is 1, but a router that is taught needs 2; give 0, or at least 2", options=("router.hidden",)
        )
    recipe.device = find_device(recipe.device)
    own_device(recipe.device)
    if recipe.precision == "auto":
        # Without AMX, products in bf16 can take twice the time of fp32 even where AVX-512 has instructions for them.
        fast = recipe.device != "cpu" or torch.cpu.get_capabilities().get("amx_bf16", False)
        recipe.precision = "bf16" if fast else "fp32"
    return recipe


def fit_to_base(recipe: Recipe, base: BaseModel) -> None:
    """Replace the settings that depend on the base by their values.

    Raises:
        InputError: The base does not allow a setting.
    """
    width = base.config.hidden_size
    recipe.fit_ranks(width)
    if "lora" in recipe.stages and recipe.lora.rank > width:
        raise InputError(
            f"lora.rank is {recipe.lora.rank}, but the model's hidden size is {width}; give at most {width}",
            options=("lora.rank",),
        )
    _ = base.shards  # raises if they are missing
    if recipe.dtype == "auto":
        recipe.dtype = short_name(base.dtype("auto"))
    recipe.fit_windows(getattr(base.config, "max_position_embeddings", None))
    settle_batches(recipe)
    if OWN_TEXT in recipe.data:
        check_own_text(recipe)


def read_inputs(conversion: Conversion) -> None:
    """Read the text, and refuse bad input before any work is done.

    Args:
        conversion: Its recipe is fitted to the base; streams, held-out and further texts are set here.

    Raises:
        InputError: A text cannot be used.
    """
    recipe, base, streams = conversion.recipe, conversion.base, conversion.streams
    conversion.further = further_texts(base, recipe.window, recipe.yardstick_tokens, conversion.also)
    if OWN_TEXT in recipe.data and group().local_rank:
        _wait_for(own_text_file(base, recipe.self_tokens, recipe.self_seed))
    conversion.text = texts_of(recipe, base, conversion.progress, recipe.device)
    for split in ("train", "calibration", recipe.eval_split):
        trains = split == "train"
        length, enough = (recipe.train_window, tokens_to_read(recipe)) if trains else (recipe.window, 0)
        streams[split] = conversion.text.stream(split, base.tokenizer, length, enough)
    check_text(recipe, streams)
    vocabulary = base.config.vocab_size
    largest = max(int(stream.max()) for stream in streams.values() if stream.numel())
    if largest >= vocabulary:
        raise InputError(
            f"{recipe.model}: its tokenizer yields id {largest}, but the model's vocabulary ends at {vocabulary - 1}"
        )
    evaluation = windows(streams[recipe.eval_split], recipe.window, f"{recipe.eval_split} split")
    conversion.heldout = pick(evaluation, recipe.eval_tokens)


def _wait_for(own_text: Path) -> None:
    """Wait until the first process of this machine has sampled the text; if that one fails, the launcher ends all."""
    while not own_text.is_file():
        time.sleep(_LOOK_SECONDS)


def capture_and_rewrite(conversion: Conversion) -> None:
    """Capture the base and insert untrained forecasters, routers and muxes."""
    conversion.base.check_finite()
    conversion.model = rewritten(conversion.recipe, conversion.base)


def rewritten(recipe: Recipe, base: BaseModel) -> RoutedForCausalLM:
    """Return the base with untrained forecasters, routers and muxes.

    Args:
        recipe: Resolved, and fitted to the base.
        base: The base model.

    Raises:
        InputError: The model cannot be captured, or it cannot reach a target in FLOPs.
    """
    spec = RoutingSpec(
        rank=recipe.rank,
        ffn_rank=recipe.ffn_rank,
        forecaster=recipe.forecaster,
        policy=recipe.policy,
        sparsity=recipe.sparsity,
        seed=recipe.seed,
        reads=recipe.router.reads,
        router_hidden=recipe.router.hidden or 0,
    )
    model = build_routed(base, spec, recipe.dtype, recipe.device, recipe.seed)
    if recipe.flops is not None:
        found = flops_range(model, recipe.window)
        budget, *_ = [flops_budget(found, ratio) for ratio in (recipe.flops, *recipe.dial)]
        set_share(model, budget.sparsity)
    return model


def run_stages(conversion: Conversion) -> None:
    """Run every stage that is not finished, each on the result of the one before."""
    recipe = conversion.recipe
    context = StageContext(
        conversion.model,
        recipe,
        conversion.streams["train"],
        conversion.streams["calibration"],
        conversion.work,
        conversion.progress,
    )
    prepare(context)
    cache = None
    if conversion.stage_cache_folder is not None:
        cache = StageCache(conversion.stage_cache_folder, conversion.base.identity(), conversion.text.fingerprint())
    for stage in recipe.stages:
        figures = _finished_stage(conversion, cache, stage)
        if figures is None:
            with place(f"stage {stage}"):
                figures = _run_stage(conversion, context, cache, stage)
        else:
            load_stage(conversion.model, conversion.work, stage, recipe)
        conversion.stage_figures[stage] = figures
        conversion.seconds[stage] = figures["seconds"]
        log.debug("phase %s ended after %.1f s", stage, figures["seconds"])
    conversion.keep = conversion.stage_figures[recipe.stages[-1]].pop("calibration_keep")
    if recipe.dial:
        text = context.calibration_windows()
        found = None if recipe.flops is None else flops_range(conversion.model, recipe.window)
        kind, own = recipe.target
        points = dial_points(conversion.model, text, recipe.others_on_dial, conversion.progress, found)
        realized = conversion.stage_figures[recipe.stages[-1]][f"calibration_{kind}"]
        unchanged = {unit.name: 0.0 for unit in conversion.model.units}
        points.append({kind: own, "realized": realized, "shift": unchanged, "keep": conversion.keep})
        points.sort(key=lambda point: point[kind])
        conversion.dial = tuple(DialPoint(**point) for point in points)
    set_key_policy(conversion.model, KeyPolicy(recipe.kv_policy, recipe.kv_threshold), conversion.keep)


def _finished_stage(conversion: Conversion, cache: StageCache | None, stage: str) -> dict[str, Any] | None:
    """Return the figures of a stage that the work folder or the cache holds, or None."""
    figures = stage_figures(conversion.work, stage)
    if figures is None and cache is not None and cache.fetch(conversion.recipe, stage, conversion.work):
        figures = stage_figures(conversion.work, stage)
    return figures


def _run_stage(
    conversion: Conversion, context: StageContext, cache: StageCache | None, stage: StageName
) -> dict[str, Any]:
    """Run a stage, save its result, and return its figures."""
    started, worked = time.monotonic(), time.process_time()
    figures = STAGE_RUNNERS[stage](context)
    earlier = figures.pop("earlier_seconds", (0.0, 0.0))  # runs of this stage that were killed
    figures["seconds"] = earlier[0] + time.monotonic() - started
    figures["cpu_seconds"] = earlier[1] + time.process_time() - worked
    if is_main_process():
        save_stage(conversion.model, conversion.work, stage, figures)
        if cache is not None:
            cache.store(conversion.recipe, stage, conversion.work)
    return figures


def evaluate_heldout(conversion: Conversion) -> None:
    """Measure the result on held-out text."""
    with conversion.progress(text_name(conversion.recipe.eval_split), len(conversion.heldout)) as progress:
        conversion.evaluation = evaluate(conversion.model, conversion.heldout, progress)


def evaluate_texts(conversion: Conversion) -> None:
    """Measure the result on the yardstick and on the user's further texts."""
    conversion.texts = measure_texts(conversion.model, conversion.further, conversion.progress)


PHASES = (
    ("capture", capture_and_rewrite),
    ("stages", run_stages),
    ("evaluate", evaluate_heldout),
    ("texts", evaluate_texts),
)


def finish(conversion: Conversion) -> None:
    """Write the bundle atomically, and remove the work folder.

    Raises:
        IrcError: The bundle cannot be written. The work folder stays.
    """
    conversion.metrics = metrics_of(conversion)
    if not is_main_process():
        return
    remedy = f"solve this and resume; the trained stages are kept in {conversion.work}"
    with staged(conversion.output, remedy, ("resume",)) as staging:
        recipe = with_absolute_paths(conversion.recipe).to_dict()
        card = model_card(conversion.metrics, conversion.recipe)
        write_bundle(conversion.model, staging, conversion.metrics, recipe, card, conversion.dial)
    remove_work(conversion.work)


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
            "seq_len": conversion.recipe.window,
        },
        **result_metrics(conversion.model, result, conversion.recipe.target),
        "texts": conversion.texts,
        "calibration_keep": conversion.keep,
        "seconds": seconds,
        "stages": conversion.stage_figures,
        "output": str(conversion.output),
    }


__all__ = ["PHASES", "Conversion", "convert", "fit_to_base", "metrics_of", "resolve", "rewritten"]
