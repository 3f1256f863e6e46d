"""`irc export`: write a bundle, or a plain model densely, as ONNX; rewrite a folder of an older version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from exporters.onnx_format import BLOCK_SIZES, QUANTIZED, ROUNDINGS, Quantization
from irc.cli.options import (
    common_options,
    dtype_option,
    files,
    force_option,
    key_policy_options,
    output_option,
    target_options,
)

_WITH_UPGRADE = frozenset({"upgrade", "as_json", "debug", "help"})


@click.command()
@click.argument("model", required=False, shell_complete=files)
@output_option("Folder to write.")
@dtype_option(
    more=list(QUANTIZED),
    also=" Also int4 and int8: the base's weights in blocks of 4 or 8 bits; it computes in fp32, for cuda in fp16.",
)
@click.option(
    "--block-size",
    type=click.Choice([str(size) for size in BLOCK_SIZES]),
    help=f"int4, int8: weights that share a scale. [default: {Quantization.block_size}]",
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="int4, int8: blocks with a scale alone, or with a zero point too. [default: "
    f"{'symmetric' if Quantization.symmetric else 'asymmetric'}]",
)
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "4"]),
    help="int4, int8: 4 rounds the inputs of products to 8 bits, which is faster on CPUs; 0 does not. "
    f"[default: {Quantization.accuracy_level}]",
)
@click.option(
    "--rounding",
    type=click.Choice(ROUNDINGS),
    help="int4, int8: nearest, or gptq, whose weights take up each other's errors on the conversion's calibration "
    f"text; it takes longer, and memory for the model in fp32. [default: {Quantization.rounding}]",
)
@click.option(
    "--layout",
    type=click.Choice(["onnx", "triton"]),
    default="onnx",
    show_default=True,
    help="onnx, or triton for a model repository of Triton Inference Server.",
)
@click.option(
    "--ops-library",
    metavar="PATH",
    help="Native operators for other runtimes: a library to copy into the folder for onnxruntime-genai, or auto for "
    "the installed one. triton: where the server finds it.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Provider to write the model for; each runs on the other too. For cuda, products become RoutedMatMul and "
    "RoutedGate (not with int4 and int8), with which native CUDA kernels decode without waiting for the GPU.",
)
@click.option(
    "--upgrade",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Rewrite DIR, which an older irc exported, into today's format, and do nothing else.",
)
@click.option("--base", metavar="MODEL", help="Where the bundle's base model is, if it has moved.")
@click.option(
    "--dump-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write the graph before and after every pass there, and the difference.",
)
@target_options
@key_policy_options
@force_option()
@common_options
def command(
    model: str | None,
    output: Path | None,
    dtype: str,
    block_size: str | None,
    symmetric: bool | None,
    accuracy_level: str | None,
    rounding: str | None,
    layout: str,
    ops_library: str | None,
    provider: str,
    base: str | None,
    dump_dir: Path | None,
    kv_policy: str | None,
    kv_threshold: float | None,
    sparsity: float | None,
    flops: float | None,
    force: bool,
    upgrade: Path | None,
    as_json: bool,
) -> None:
    """Export MODEL, a bundle or a plain model (folder, hub id, or demo), as an ONNX folder.

    The folder holds the model with a key/value cache, its weights, configuration and tokenizer. Stock ONNX
    Runtime and onnxruntime-genai run it unchanged. Under the key/value policy reduced, some layers have
    shorter caches than others; irc's own runtime handles them, onnxruntime-genai does not.
    """
    if upgrade is not None:
        _refuse_beside_upgrade(click.get_current_context())
        _upgrade(upgrade, as_json)
        return
    if model is None or output is None:
        raise click.UsageError("give MODEL and --output PATH, or --upgrade DIR")
    from irc import console
    from irc.bundle.source import ModelSource
    from irc.deployment.onnx_folder import ExportOptions, export
    from irc.recipe.key_policy import KeyPolicy

    quantization = _quantization(dtype, block_size, symmetric, accuracy_level, rounding)
    console.note(f"exporting {model}: dtype {dtype}, layout {layout}, provider {provider}")
    policy = KeyPolicy.chosen(kv_policy, kv_threshold)
    computed = dtype if quantization is None else "float16" if provider == "cuda" else "float32"
    source = ModelSource(model, base, computed, key_policy=policy, sparsity=sparsity, flops=flops)
    result = export(source, output, ExportOptions(layout, provider, ops_library, dump_dir, force, quantization))
    if as_json:
        console.emit_json(result)
        return
    units = result["routed_units"]
    console.table(
        "exported",
        ["", ""],
        [
            ["folder", result["model"]],
            ["data type", _shown_type(result)],
            ["meant for", result["provider"]],
            ["opset", f"{result['opset']}, irc {result['op_version']}" if units else str(result["opset"])],
            ["routed units", str(units) if units else "none (dense)"],
            *([["reduced units", str(result["reduced_units"])]] if result["kv_policy"] == "reduced" else []),
            ["size", f"{result['bytes'] / 1e6:.1f} MB"],
            ["seconds", f"{result['seconds']['export']:.1f}"],
        ],
    )


def _quantization(
    dtype: str, block_size: str | None, symmetric: bool | None, accuracy_level: str | None, rounding: str | None
) -> Quantization | None:
    """Return how weights are quantized, None where they are not."""
    given = {
        "block_size": None if block_size is None else int(block_size),
        "symmetric": symmetric,
        "accuracy_level": None if accuracy_level is None else int(accuracy_level),
        "rounding": rounding,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if dtype in QUANTIZED:
        return Quantization(QUANTIZED[dtype], **settings)
    if settings:
        flag = {"symmetric": "--symmetric or --asymmetric"}.get(
            name := next(iter(settings)), f"--{name}".replace("_", "-")
        )
        raise click.UsageError(f"{flag} is for --dtype int4 and int8")
    return None


def _shown_type(result: dict[str, Any]) -> str:
    found = result["quantization"]
    if found is None:
        return str(result["dtype"])
    kind = "symmetric" if found["symmetric"] else "asymmetric"
    blocks = f"int{found['bits']} in {kind} blocks of {found['block_size']}"
    if (text := result["rounding_text"]) is not None:
        blocks += f", rounded by {found['rounding']} on {text['tokens']:,} tokens of {text['name']}"
    return f"{blocks}, accuracy level {found['accuracy_level']}, computes in {result['dtype']}"


def _refuse_beside_upgrade(context: click.Context) -> None:
    given = [
        "MODEL" if isinstance(parameter, click.Argument) else parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in _WITH_UPGRADE
        and context.get_parameter_source(str(parameter.name)) is not ParameterSource.DEFAULT
    ]
    if given:
        raise click.UsageError(f"--upgrade DIR rewrites DIR as it is; leave out {', '.join(given)}")


def _upgrade(folder: Path, as_json: bool) -> None:
    from irc import console
    from irc.deployment.upgrade import upgrade

    result = upgrade(folder)
    if as_json:
        console.emit_json(result)
    elif result["from_version"] == result["format_version"]:
        console.say(f"{folder}: already of format version {result['format_version']}; nothing was changed")
    else:
        console.say(f"{folder}: rewritten from format version {result['from_version']} to {result['format_version']}")
