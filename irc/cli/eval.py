"""`irc eval`: perplexity and realized sparsity of a bundle or a plain model on text."""

from __future__ import annotations

from typing import Any

import click

from irc.cli.options import (
    common_options,
    data_option,
    device_option,
    dtype_option,
    key_policy_options,
    seq_len_option,
    shares,
)


@click.command()
@click.argument("model")
@data_option(None)
@click.option(
    "--split",
    type=click.Choice(["auto", "all", "train", "calibration", "validation", "heldout"]),
    default="auto",
    show_default=True,
    help="Part of the text; auto is heldout for the text of the conversion and for stdlib, else all.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=0),
    metavar="N",
    help="Tokens to read, spread evenly; 0 reads all. [default: as in convert]",
)
@click.option("--base", metavar="MODEL", help="Where the bundle's base model is, if it has moved.")
@device_option()
@dtype_option()
@seq_len_option(None)
@key_policy_options
@click.option(
    "--kv-sweep",
    default="",
    callback=shares,
    metavar="LIST",
    help="Comma-separated thresholds of the key/value policy reduced: memory saved against perplexity.",
)
@common_options
def command(
    model: str, as_json: bool, kv_policy: str | None, kv_threshold: float | None, kv_sweep: list[float], **options: Any
) -> None:
    """Evaluate MODEL, a bundle or a plain model (folder, hub id, or demo)."""
    from irc import console
    from irc.cli.report import figures_table, kv_report
    from irc.evaluation_run import run_evaluation
    from irc.key_policy import KeyPolicy

    metrics = run_evaluation(
        model,
        console.progress,
        key_policy=KeyPolicy.chosen(kv_policy, kv_threshold),
        kv_thresholds=kv_sweep,
        **options,
    )
    if as_json:
        console.emit_json(metrics)
        return
    data = metrics["data"]
    figures_table(f"{data['name']}, split {data['split']}, {data['tokens']:,} tokens", metrics)
    if "units" in metrics:
        rows = [
            [name, f"{unit['keep_ratio']:.3f}", console.bar(unit["keep_ratio"], 20), f"{unit['recoverability']:.3f}"]
            for name, unit in metrics["units"].items()
        ]
        console.table("units", ["unit", "keep", "", "recoverability"], rows)
    if "kv_sweep" in metrics:
        kv_report(metrics)
