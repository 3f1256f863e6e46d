"""`irc eval`: measures perplexity and realized sparsity of a bundle or a plain model on text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from irc.cli.options import (
    also_option,
    common_options,
    data_option,
    device_option,
    dtype_option,
    files,
    fraction_list,
    key_policy_options,
    name_list,
    seq_len_option,
    target_options,
)

if TYPE_CHECKING:
    from irc.bundle.source import ModelSource
    from irc.evaluation.run import TextChoice


@click.command()
@click.argument("model", shell_complete=files)
@data_option(None)
@click.option(
    "--split",
    type=click.Choice(["auto", "all", "train", "calibration", "validation", "heldout"]),
    default="auto",
    show_default=True,
    help="Part of the text to read; auto means heldout for the text of the conversion, stdlib and self, otherwise all.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=0),
    metavar="N",
    help="Tokens to read, spread evenly; 0 reads all. [default: as in the conversion]",
)
@also_option()
@click.option(
    "--yardstick-tokens",
    type=click.IntRange(min=0),
    metavar="N",
    help="Tokens of each text of irc's yardstick (prose, code, technical text, dialogue); 0 leaves it out. "
    "[default: as in the conversion, 4096]",
)
@click.option("--base", metavar="MODEL", help="The bundle's base model, if it has moved.")
@click.option("--bundle", metavar="PATH", help="What an ONNX folder was exported from, if it has moved.")
@device_option()
@dtype_option()
@seq_len_option(None)
@target_options
@click.option(
    "--sparsity-sweep",
    "sparsities",
    default="",
    callback=fraction_list,
    metavar="LIST",
    help="Also measure perplexity and FLOPs at these sparsities, within the range of the bundle's dial.",
)
@click.option(
    "--flops-sweep",
    "flops_ratios",
    default="",
    callback=fraction_list,
    metavar="LIST",
    help="The same at these FLOPs ratios, for a dial that was made for FLOPs.",
)
@key_policy_options
@click.option(
    "--kv-sweep",
    default="",
    callback=fraction_list,
    metavar="LIST",
    help="Also measure memory and perplexity at these thresholds of key/value policy reduced.",
)
@click.option(
    "--tasks",
    callback=name_list,
    metavar="LIST",
    help="Run tasks of lm-evaluation-harness instead of measuring perplexity. code_continuation, code_closing and "
    "code_recall are built from --data and need no network. MODEL may also be an ONNX folder.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Questions per task. [default: all; 200 for code_...]"
)
@click.option(
    "--task-path", type=click.Path(path_type=Path), metavar="DIR", help="Folder with more task files for the harness."
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
    data: str | None,
    split: str,
    tokens: int | None,
    seq_len: int | None,
    sparsities: list[float],
    also: tuple[str, ...],
    yardstick_tokens: int | None,
    flops_ratios: list[float],
    bundle: str | None,
    **opening: Any,
) -> None:
    """Evaluate MODEL: a bundle, a plain model (folder, Hub id, or demo), or an ONNX folder."""
    from exporters.onnx_format import MANIFEST
    from irc import console
    from irc.bundle.source import ModelSource
    from irc.cli.report import dial_report, figures_table, kv_report, texts_table
    from irc.errors import InputError
    from irc.evaluation.run import TextChoice, run_evaluation
    from irc.recipe.key_policy import KeyPolicy

    source = ModelSource(model, key_policy=KeyPolicy.chosen(kv_policy, kv_threshold), **opening)
    if tasks is not None:
        given: dict[str, object] = {
            "--kv-sweep": kv_sweep,
            "--sparsity-sweep": sparsities,
            "--flops-sweep": flops_ratios,
        }
        given |= {"--tokens": tokens, "--seq-len": seq_len, "--split": split != "auto", "--also": also}
        for flag, value in given.items():
            if value:
                raise InputError(f"{flag} applies to perplexity only; leave it or --tasks out")
        _evaluate_tasks(source, tasks, data or "stdlib", limit, task_path, as_json)
        return
    choice = TextChoice(data, split, tokens, seq_len, yardstick_tokens, also)
    if (Path(model) / MANIFEST).is_file():
        _evaluate_folder(Path(model), choice, source, bundle, [*kv_sweep, *sparsities, *flops_ratios], as_json)
        return
    if bundle is not None:
        raise InputError("--bundle says what an ONNX folder was exported from, and MODEL is none; leave it out")
    metrics = run_evaluation(
        source,
        console.progress,
        choice,
        kv_thresholds=kv_sweep,
        sparsities=sparsities,
        flops_ratios=flops_ratios,
    )
    if as_json:
        console.emit_json(metrics)
        return
    read = metrics["data"]
    texts_table(f"{read['name']}, {read['split']}", metrics)
    figures_table(f"{read['name']}, split {read['split']}, {read['tokens']:,} tokens", metrics)
    if "units" in metrics:
        rows = [
            [name, f"{unit['keep_ratio']:.3f}", console.bar(unit["keep_ratio"], 20), f"{unit['recoverability']:.3f}"]
            for name, unit in metrics["units"].items()
        ]
        console.table("units", ["unit", "keep", "", "recoverability"], rows)
    for sweep in ("sparsity_sweep", "flops_sweep"):
        if sweep in metrics:
            dial_report(metrics, sweep)
    if "kv_sweep" in metrics:
        kv_report(metrics)


def _evaluate_folder(
    folder: Path, choice: TextChoice, source: ModelSource, bundle: str | None, sweeps: list[float], as_json: bool
) -> None:
    """Evaluate an ONNX folder, whose targets, types and policies are those that it was exported with."""
    from irc import console
    from irc.bundle.source import ModelSource
    from irc.cli.report import folder_report
    from irc.deployment.comparison import evaluate_folder
    from irc.errors import InputError

    base = None if source.base is None else str(source.base)
    if sweeps or source != ModelSource(source.name, source.base):
        raise InputError(
            f"{folder}: is an ONNX folder, which runs as it was exported; leave out the options that open a bundle "
            "otherwise (--sparsity, --flops, --kv-policy, --dtype, --device, and sweeps)"
        )
    metrics = evaluate_folder(folder, console.progress, choice, bundle=bundle, base=base)
    if as_json:
        console.emit_json(metrics)
    else:
        folder_report(metrics)


def _evaluate_tasks(
    source: ModelSource, tasks: list[str], data: str, limit: int | None, task_path: Path | None, as_json: bool
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
        raise InputError("--tasks is empty; give for example code_continuation,code_recall")
    results = run_tasks(source, tasks, console.progress, data=data, limit=limit, task_path=task_path)
    if as_json:
        console.emit_json(results)
    else:
        tasks_report(results)
