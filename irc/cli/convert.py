"""`irc convert`: captures a model, inserts routers and forecasters, trains them and saves a bundle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from irc.cli.options import (
    Session,
    also_option,
    common_options,
    device_option,
    dtype_option,
    files,
    force_option,
    fraction_list,
    name_list,
    output_option,
    resume_option,
    seed_option,
    seq_len_option,
    texts_options,
)
from irc.cli.recipe_options import recipe_of, recipe_option, set_option, text_fields, without_defaults

_FLOPS = 0.85  # 15 % of the matrix products are saved: what users expect of a target, whatever the model's shape


def _list_fields(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from irc import console
    from irc.recipe.recipe import recipe_fields

    fields = recipe_fields()
    if ctx.ensure_object(Session).wants_json:
        keys = ("field", "default", "help")
        console.emit_json({"fields": [dict(zip(keys, each, strict=True)) for each in fields]})
    else:
        rows = [[name, json.dumps(default), text] for name, default, text in fields]
        console.table("fields of a recipe", ["field", "default", "meaning"], rows)
    ctx.exit()


_FIGURES = ("kl", "top1")


def _limits(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, float]:
    """Read the limits of --require."""
    limits = {}
    for given in value:
        name, _, number = given.partition("=")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if name.strip() not in _FIGURES or not 0 <= limit < math.inf:
            raise click.BadParameter(f"'{given}' is not a limit; use for example kl=0.2 or top1=0.9", ctx, parameter)
        limits[name.strip()] = limit
    return limits


@click.command()
@click.argument("model", required=False, shell_complete=files)
@output_option("Folder for the bundle.", required=True)
@texts_options
@also_option()
@click.option(
    "--require",
    "required",
    multiple=True,
    callback=_limits,
    metavar="FIGURE=VALUE",
    help="Fail (exit code 3, the bundle is kept) if a text misses this: kl=0.2 (at most) or top1=0.9 (at least). "
    "Repeatable.",
)
@click.option(
    "--flops",
    type=float,
    metavar="RATIO",
    help="Target: matrix-multiply FLOPs of the routed model over those of the dense one, head, routers and forecasters "
    f"included; 0.8 saves 20 %. [default: {_FLOPS:g}]",
)
@click.option(
    "--sparsity",
    type=float,
    metavar="SHARE",
    help="Target in place of --flops: fraction of (token, unit) pairs to approximate.",
)
@click.option(
    "--policy",
    metavar="NAME",
    help="Routing policy: informed, skipgpt, mod, random, static or static-forecast (see docs/method.md). "
    "[default: informed]",
)
@click.option(
    "--dial",
    default="",
    callback=fraction_list,
    metavar="LIST",
    help="Also store thresholds for these targets: FLOPs ratios such as 0.7,0.8,0.9, or with --sparsity sparsities; "
    "the bundle can then run at any in between.",
)
@click.option(
    "--rank",
    type=int,
    metavar="N",
    help="Rank of the forecasters. [default: min(100, hidden size / 10), twice that for FFN units]",
)
@click.option("--forecaster", type=click.Choice(["linear", "silu"]), help="Form of the forecasters. [default: linear]")
@click.option(
    "--stages",
    callback=name_list,
    metavar="LIST",
    help="Stages to run: some of lff, router, lora, in this order. [default: those that the policy needs]",
)
@recipe_option(
    "Recipe to start from: a YAML file, or a ready one: llama-3.2-1b, llama-3.2-3b or llama-3.1-8b, each also with "
    "-25, -40 or -70 (percent to skip)."
)
@set_option()
@click.option(
    "--fields",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_fields,
    help="List every field of a recipe with its default and meaning, then exit.",
)
@click.option(
    "--stage-cache",
    "stages_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Reuse identical finished stages from DIR and store new ones there.",
)
@click.option(
    "--dry-run", is_flag=True, help="Estimate time, memory and disk space from two steps of each stage; write nothing."
)
@device_option()
@dtype_option()
@seq_len_option(None)
@seed_option(None)
@resume_option()
@force_option()
@common_options
def command(
    model: str | None,
    output: Path,
    as_json: bool,
    force: bool,
    resume: bool,
    dry_run: bool,
    also: tuple[str, ...],
    required: dict[str, float],
    **flags: Any,
) -> None:
    """Convert MODEL (a folder, a Hub id, or demo) into a bundle of trained routers and forecasters."""
    from irc import console
    from irc.cli.report import conversion_report
    from irc.conversion.pipeline import convert
    from irc.evaluation.figures import check_limits
    from irc.training.processes import is_main_process

    recipe_file, overrides, cache = (flags.pop(name) for name in ("recipe_file", "overrides", "stages_folder"))
    flags |= {"model": model, "dial": flags["dial"] or None} | text_fields(flags)
    recipe = recipe_of(recipe_file, overrides, without_defaults(flags), {"flops": _FLOPS})
    if is_main_process():
        console.note(
            f"converting {recipe.model} with {recipe.data_name}: target {recipe.target}, "
            f"policy {recipe.policy}, seed {recipe.seed}"
        )
    if dry_run:
        from irc.cli.report import dry_run_report
        from irc.conversion.dry_run import estimate_conversion

        plan = estimate_conversion(recipe, output, console.progress)
        console.emit_json(plan) if as_json else dry_run_report(plan)
        return
    metrics = convert(recipe, output, console.progress, force=force, resume=resume, stage_cache_folder=cache, also=also)
    if not is_main_process():
        return
    if as_json:
        console.emit_json(metrics)
    else:
        conversion_report(metrics)
    check_limits(metrics, required)
