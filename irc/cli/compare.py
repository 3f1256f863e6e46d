"""`irc compare`: routing policies against each other on one model and one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from irc.cli.options import (
    common_options,
    data_option,
    device_option,
    dtype_option,
    files,
    force_option,
    numbers,
    output_option,
    resume_option,
    shares,
    words,
)


@click.command()
@click.argument("model", required=False, shell_complete=files)
@output_option("Folder of the comparison: its cells, results.json and report.html.", required=True)
@click.option(
    "--policies",
    default="informed,skipgpt,mod,random,static",
    show_default=True,
    callback=words,
    metavar="LIST",
    help="Routing policies (docs/method.md).",
)
@click.option(
    "--sparsities", default="0.25,0.4,0.7", show_default=True, callback=shares, metavar="LIST", help="Targets."
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Seeds a cell.")
@click.option("--lora", is_flag=True, help="Every cell with a LoRA stage too, and the dense model under that budget.")
@click.option(
    "--budgets", default="", callback=shares, metavar="LIST", help="Shares of the router stage's steps to try too."
)
@click.option("--ranks", default="", callback=numbers, metavar="LIST", help="Forecaster ranks to sweep.")
@click.option(
    "--calibration-tokens", default="", callback=numbers, metavar="LIST", help="Tokens of the lff stage to sweep."
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="NAME:KEY=VALUE,...",
    help="An option of policy informed to try beside the plain method, such as frozen:router.forecaster_lr=0.",
)
@click.option(
    "--kv-sweep", default="", callback=shares, metavar="LIST", help="Thresholds of the key/value policy reduced."
)
@data_option(None)
@click.option(
    "--recipe", "recipe_file", type=click.Path(path_type=Path), metavar="FILE", help="Recipe (YAML) to start from."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe field, such as router.steps=500."
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Conversions at a time, each in a process with its share of the cores.",
)
@device_option()
@dtype_option()
@resume_option()
@force_option()
@common_options
def command(model: str | None, output: Path, as_json: bool, **options: Any) -> None:
    """Train and evaluate policies on MODEL (a folder, a hub id, or demo) under one budget, and write a report.

    Every cell is a conversion: same text, same steps, same seeds. A killed comparison goes on with --resume. Figures
    are taken on held-out text; choose settings with --set eval_split=validation.
    """
    from irc import console
    from irc.cli.compare_tables import comparison_tables
    from irc.compare.cells import Plan, read_variants
    from irc.compare.report import check_tools, write_report
    from irc.compare.run import REPORT, compare
    from irc.recipe.recipe import load_recipe

    check_tools()
    recipe = load_recipe(options["recipe_file"], options["overrides"])
    for name in ("device", "dtype"):
        if options[name] != "auto":
            setattr(recipe, name, options[name])
    recipe.model, recipe.data = model or recipe.model, options["data"] or recipe.data
    plan = Plan(
        policies=options["policies"],
        sparsities=options["sparsities"],
        seeds=tuple(range(options["seeds"])),
        lora=options["lora"],
        budgets=options["budgets"],
        ranks=options["ranks"],
        calibration_tokens=options["calibration_tokens"],
        variants=read_variants(options["variants"]),
    )
    results = compare(
        plan,
        recipe,
        output,
        console.progress,
        jobs=options["jobs"],
        resume=options["resume"],
        force=options["force"],
        kv_thresholds=tuple(options["kv_sweep"]),
    )
    write_report(results, output / REPORT)
    if as_json:
        console.emit_json(results)
    else:
        comparison_tables(results)
        console.say(f"report: {output / REPORT}")
