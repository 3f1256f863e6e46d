"""`irc compare`: compares routing policies on one model and one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from irc.cli.options import (
    common_options,
    device_option,
    dtype_option,
    files,
    force_option,
    fraction_list,
    name_list,
    number_list,
    output_option,
    resume_option,
    texts_options,
)
from irc.cli.recipe_options import recipe_of, recipe_option, set_option, text_fields, without_defaults


@click.command()
@click.argument("model", required=False, shell_complete=files)
@output_option("Folder for the cells, results.json and report.html.", required=True)
@click.option(
    "--policies",
    default="informed,skipgpt,mod,random,static",
    show_default=True,
    callback=name_list,
    metavar="LIST",
    help="Routing policies to compare (see docs/method.md).",
)
@click.option(
    "--flops",
    default="",
    callback=fraction_list,
    metavar="LIST",
    help="Target FLOPs ratios, routed over dense, such as 0.9,0.8: all policies then save the same work.",
)
@click.option(
    "--sparsities",
    default="",
    callback=fraction_list,
    metavar="LIST",
    help="Target sparsities. [default: 0.25,0.4,0.7; none with --flops]",
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Seeds per cell.")
@click.option(
    "--lora", is_flag=True, help="Also run every cell with a LoRA stage, and the dense model with the same LoRA budget."
)
@click.option(
    "--budgets",
    default="",
    callback=fraction_list,
    metavar="LIST",
    help="Also train with these fractions of the router stage's steps.",
)
@click.option(
    "--ranks", default="", callback=number_list, metavar="LIST", help="Forecaster ranks of all units to sweep."
)
@click.option(
    "--calibration-tokens", default="", callback=number_list, metavar="LIST", help="Tokens of the lff stage to sweep."
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="NAME:KEY=VALUE,...",
    help="Also run policy informed with other settings, such as frozen:router.forecaster_lr=0. Repeatable.",
)
@click.option(
    "--kv-sweep",
    default="",
    callback=fraction_list,
    metavar="LIST",
    help="Thresholds of key/value policy reduced to sweep.",
)
@texts_options
@recipe_option("Recipe to start from: a YAML file or a ready one (see irc convert).")
@set_option()
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Conversions to run at a time, each in a process with its share of the cores.",
)
@device_option()
@dtype_option()
@resume_option()
@force_option()
@common_options
def command(model: str | None, output: Path, as_json: bool, **options: Any) -> None:
    """Train and evaluate routing policies on MODEL (a folder, a Hub id, or demo) and write a report.

    Every cell is one conversion; all use the same text, steps and seeds. Continue an interrupted comparison with
    --resume. Figures are measured on held-out text; to choose settings, use --set eval_split=validation.
    """
    from irc import console
    from irc.cli.compare_tables import comparison_tables
    from irc.compare.cells import Plan, read_variants
    from irc.compare.report import check_tools, write_report
    from irc.compare.run import REPORT, compare

    check_tools()
    flags = (
        {"model": model or None} | {name: options[name] or None for name in ("device", "dtype")} | text_fields(options)
    )
    recipe = recipe_of(options["recipe_file"], options["overrides"], without_defaults(flags))
    plan = Plan(
        policies=options["policies"],
        sparsities=options["sparsities"] or ([] if options["flops"] else [0.25, 0.4, 0.7]),
        flops=options["flops"],
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
