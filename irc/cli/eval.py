"""`irc eval`: perplexity and realized sparsity of a bundle or a plain model on text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from irc.cli.options import (
    common_options,
    data_option,
    device_option,
    dtype_option,
    files,
    key_policy_options,
    seq_len_option,
    shares,
    sparsity_option,
    words,
)

if TYPE_CHECKING:
    from irc.bundle.key_policy import KeyPolicy


@click.command()
@click.argument("model", shell_complete=files)
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
@sparsity_option()
@click.option(
    "--sparsity-sweep",
    "sparsities",
    default="",
    callback=shares,
    metavar="LIST",
    help="Comma-separated sparsities within the bundle's dial: perplexity and FLOPs at each.",
)
@key_policy_options
@click.option(
    "--kv-sweep",
    default="",
    callback=shares,
    metavar="LIST",
    help="Comma-separated thresholds of the key/value policy reduced: memory saved against perplexity.",
)
@click.option(
    "--tasks",
    callback=words,
    metavar="LIST",
    help="Tasks of lm-evaluation-harness in place of perplexity; without a network: code_continuation, code_closing, "
    "code_recall (made of --data). MODEL may be an ONNX folder too.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Questions a task. [default: all; 200 of code_...]"
)
@click.option(
    "--task-path", type=click.Path(path_type=Path), metavar="DIR", help="Folder of further task files of the harness."
)
@common_options
def command(
    model: str,
    as_json: bool,
    kv_policy: str | None,
    kv_threshold: float | None,
    kv_sweep: list[float],
    tasks: list[str] | None,
    limit: int | None,
    task_path: Path | None,
    **options: Any,
) -> None:
    """Evaluate MODEL, a bundle or a plain model (folder, hub id, or demo)."""
    from irc import console
    from irc.bundle.key_policy import KeyPolicy
    from irc.cli.report import figures_table, kv_report, sparsity_report
    from irc.errors import InputError
    from irc.evaluation.run import run_evaluation

    if tasks is not None:
        given = {"--kv-sweep": kv_sweep, "--sparsity-sweep": options["sparsities"], "--tokens": options["tokens"]}
        given |= {"--seq-len": options["seq_len"], "--split": options["split"] != "auto"}
        for flag, value in given.items():
            if value:
                raise InputError(f"{flag} is for perplexity; --tasks read whole questions, so leave one of them out")
        key_policy = KeyPolicy.chosen(kv_policy, kv_threshold)
        _evaluate_tasks(model, tasks, limit, task_path, as_json, options, key_policy)
        return
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
    if "sparsity_sweep" in metrics:
        sparsity_report(metrics)
    if "kv_sweep" in metrics:
        kv_report(metrics)


def _evaluate_tasks(
    model: str,
    tasks: list[str],
    limit: int | None,
    task_path: Path | None,
    as_json: bool,
    options: dict[str, Any],
    key_policy: KeyPolicy | None,
) -> None:
    from irc import console
    from irc.cli.report import tasks_report
    from irc.errors import InputError

    try:
        from irc.evaluation.tasks.harness import run_tasks
    except ImportError as error:
        raise InputError(
            f"--tasks needs lm-evaluation-harness ({error}); install it with: "
            "pip install 'informed-routing-compiler[tasks]'"
        ) from error
    if not tasks:
        raise InputError("--tasks names no task; give some such as code_continuation,code_recall")
    results = run_tasks(
        model,
        tasks,
        console.progress,
        data=options["data"] or "stdlib",
        limit=limit,
        task_path=task_path,
        base=options["base"],
        dtype=options["dtype"],
        device=options["device"],
        key_policy=key_policy,
        sparsity=options["sparsity"],
    )
    if as_json:
        console.emit_json(results)
    else:
        tasks_report(results)
