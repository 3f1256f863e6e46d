"""`irc export`: write a bundle, or a plain model densely, as ONNX."""

from __future__ import annotations

from pathlib import Path

import click

from irc.cli.options import (
    common_options,
    dtype_option,
    files,
    force_option,
    key_policy_options,
    output_option,
    sparsity_option,
)


@click.command()
@click.argument("model", shell_complete=files)
@output_option("Folder to write.", required=True)
@dtype_option()
@click.option(
    "--layout",
    type=click.Choice(["onnx", "triton"]),
    default="onnx",
    show_default=True,
    help="onnx, or triton for a model repository of Triton Inference Server.",
)
@click.option(
    "--ops-library", metavar="PATH", help="triton: where the server finds the native operator library to register."
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What the model is meant for. For cuda its products are written as RoutedMatMul and RoutedGate, with which "
    "native CUDA kernels decode without a wait for the GPU; every provider runs either.",
)
@click.option("--base", metavar="MODEL", help="Where the bundle's base model is, if it has moved.")
@click.option(
    "--dump-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write the graph before and after every pass there, and the difference.",
)
@sparsity_option()
@key_policy_options
@force_option()
@common_options
def command(
    model: str,
    output: Path,
    dtype: str,
    layout: str,
    ops_library: str | None,
    provider: str,
    base: str | None,
    dump_dir: Path | None,
    kv_policy: str | None,
    kv_threshold: float | None,
    sparsity: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export MODEL, a bundle or a plain model (folder, hub id, or demo), as an ONNX folder.

    The folder holds the model with a key/value cache, its weights, configuration and tokenizer. Stock ONNX
    Runtime and onnxruntime-genai run it as it stands. Under the key/value policy reduced, the caches of some
    layers are shorter than the others', which irc's own runtime handles and onnxruntime-genai does not.
    """
    from irc import console
    from irc.bundle.source import ModelSource
    from irc.deployment.onnx_folder import ExportOptions, export
    from irc.recipe.key_policy import KeyPolicy

    console.note(f"exporting {model}: dtype {dtype}, layout {layout}, provider {provider}")
    source = ModelSource(model, base, dtype, key_policy=KeyPolicy.chosen(kv_policy, kv_threshold), sparsity=sparsity)
    result = export(source, output, ExportOptions(layout, provider, ops_library, dump_dir, force))
    if as_json:
        console.emit_json(result)
        return
    units = result["routed_units"]
    console.table(
        "exported",
        ["", ""],
        [
            ["folder", result["model"]],
            ["data type", result["dtype"]],
            ["meant for", result["provider"]],
            ["opset", f"{result['opset']}, irc {result['op_version']}" if units else str(result["opset"])],
            ["routed units", str(units) if units else "none (dense)"],
            *([["reduced units", str(result["reduced_units"])]] if result["kv_policy"] == "reduced" else []),
            ["size", f"{result['bytes'] / 1e6:.1f} MB"],
            ["seconds", f"{result['seconds']['export']:.1f}"],
        ],
    )
