"""`irc convert`: capture a model, insert routers and forecasters, train them, save a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from irc.cli.options import (
    Session,
    common_options,
    data_option,
    device_option,
    dtype_option,
    files,
    force_option,
    output_option,
    resume_option,
    seed_option,
    seq_len_option,
    shares,
    words,
)


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
        console.table("fields of a recipe", ["field", "default", "what it is"], rows)
    ctx.exit()


@click.command()
@click.argument("model", required=False, shell_complete=files)
@output_option("Folder to write the bundle to.", required=True)
@data_option(None)
@click.option(
    "--sparsity", type=float, metavar="SHARE", help="Share of (token, unit) pairs to approximate. [default: 0.25]"
)
@click.option(
    "--policy", metavar="NAME", help="informed, skipgpt, mod, random or static (docs/method.md). [default: informed]"
)
@click.option(
    "--dial",
    default="",
    callback=shares,
    metavar="LIST",
    help="Other sparsities to keep thresholds for, such as 0.1,0.2,0.3,0.4,0.5,0.6; the bundle runs at any between.",
)
@click.option("--rank", type=int, metavar="N", help="Forecaster rank. [default: min(100, hidden / 10)]")
@click.option("--forecaster", type=click.Choice(["linear", "silu"]), help="Forecaster. [default: linear]")
@click.option(
    "--stages",
    callback=words,
    metavar="LIST",
    help="Comma-separated stages of lff, router, lora. [default: as the policy needs]",
)
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Recipe to start from: a YAML file, or a ready one such as llama-3.2-1b-25 (also 3.2-3b, 3.1-8b; -40, -70).",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe field, such as router.steps=500."
)
@click.option(
    "--fields",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_fields,
    help="List every field of a recipe with its default and what it is, and do nothing else.",
)
@click.option(
    "--stage-cache",
    "stages_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Take finished stages from DIR where one was trained in just this way, and leave new ones there.",
)
@click.option(
    "--dry-run", is_flag=True, help="Say what it would take (time, memory, disk) after two steps of each stage."
)
@device_option()
@dtype_option()
@seq_len_option(None)
@seed_option(None)
@resume_option()
@force_option()
@common_options
def command(
    model: str | None, output: Path, as_json: bool, force: bool, resume: bool, dry_run: bool, **flags: Any
) -> None:
    """Convert MODEL (a folder, a hub id, or demo) into a bundle of routers and forecasters."""
    from irc import console
    from irc.cli.report import conversion_report
    from irc.conversion.pipeline import convert
    from irc.conversion.work_folder import is_main_process
    from irc.recipe.recipe import load_recipe

    recipe = load_recipe(flags.pop("recipe_file"), flags.pop("overrides"))
    stages, cache = flags.pop("stages"), flags.pop("stages_folder")
    if stages is not None:
        recipe.stages = stages
    recipe.dial = flags.pop("dial") or recipe.dial
    for name, value in {"model": model, **flags}.items():
        if value is not None and not (name in ("device", "dtype") and value == "auto"):
            setattr(recipe, name, value)
    if is_main_process():
        console.note(
            f"converting {recipe.model} with {recipe.data}: sparsity {recipe.sparsity}, "
            f"policy {recipe.policy}, seed {recipe.seed}"
        )
    if dry_run:
        from irc.cli.report import plan_report
        from irc.conversion.dry_run import rehearse

        plan = rehearse(recipe, output, console.progress)
        console.emit_json(plan) if as_json else plan_report(plan)
        return
    metrics = convert(recipe, output, console.progress, force=force, resume=resume, stages=cache)
    if not is_main_process():
        return
    if as_json:
        console.emit_json(metrics)
    else:
        conversion_report(metrics)
