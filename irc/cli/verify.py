"""`irc verify`: compare an ONNX folder with the PyTorch model that it was exported from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from irc.cli.options import common_options, data_option, ops_option, provider_option, seq_len_option


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@data_option()
@click.option("--bundle", metavar="PATH", help="What the folder was exported from, if it has moved.")
@click.option("--base", metavar="MODEL", help="Where the bundle's base model is, if it has moved.")
@provider_option()
@ops_option()
@seq_len_option(128)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=4096, show_default=True, metavar="N", help="Tokens to compare on."
)
@click.option(
    "--prompts", type=click.IntRange(min=0), default=4, show_default=True, metavar="N", help="Texts to continue."
)
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="N", help="Tokens of each."
)
@click.option("--tolerance", type=float, metavar="X", help="Largest difference of logits. [default: by data type]")
@common_options
def command(
    folder: Path,
    as_json: bool,
    data: str,
    tokens: int,
    seq_len: int,
    prompts: int,
    new_tokens: int,
    **options: Any,
) -> None:
    """Verify FOLDER, the output of irc export, against PyTorch on held-out text.

    It compares logits, perplexity, the routes of every unit, and greedy continuations. The exit code is 3 if
    they differ by more than rounding explains.
    """
    from irc import console
    from irc.deployment.verification import Sample, verify
    from irc.errors import GateMissed

    sample = Sample(data, tokens, seq_len, prompts, new_tokens)
    result = verify(folder, console.progress, sample, **options)
    if as_json:
        console.emit_json(result)
    else:
        _show(result)
    if not result["ok"]:
        raise GateMissed(f"{folder}: {_what_differs(result)}")


def _what_differs(result: dict[str, Any]) -> str:
    """Say in one sentence which of the gates was missed."""
    generated, flips = result["generated"], result.get("flips", {}).get("other", 0)
    if not result["finite"]:
        range_ = " (fp16 holds none above 65,504)" if result["dtype"] == "fp16" else ""
        return f"logits are not finite numbers{range_}; export in bf16 or fp32"
    found = []
    if result["max_abs_diff"] > result["tolerance"]:
        found.append(f"logits by {result['max_abs_diff']:.3g}, the tolerance is {result['tolerance']:.3g}")
    if flips:
        found.append(f"the routes of {flips} windows, where no near tie explains it")
    if generated["identical"] < generated["prompts"]:
        found.append(f"{generated['prompts'] - generated['identical']} of {generated['prompts']} continuations")
    return f"ONNX Runtime and PyTorch differ: {'; '.join(found)}"


def _shown_type(result: dict[str, Any]) -> str:
    how = result["quantization"]
    return str(result["dtype"]) if how is None else f"int{how['bits']} and {result['dtype']}, at accuracy level 0"


def _show(result: dict[str, Any]) -> None:
    from irc import console
    from irc.cli.report import sides_table

    perplexity, generated = result["perplexity"], result["generated"]
    rows = [
        ["provider, operators, data type", f"{result['provider']}, {result['ops']}, {_shown_type(result)}"],
        ["largest difference of logits", f"{result['max_abs_diff']:.2e}  (tolerance {result['tolerance']:g})"],
        ["perplexity, PyTorch", f"{perplexity['pytorch']:.4f}"],
        ["perplexity, ONNX Runtime", f"{perplexity['onnxruntime']:.4f}"],
        ["greedy continuations", f"{generated['identical']} of {generated['prompts']} identical"],
    ]
    if result["routing_agreement"] is not None:
        rows.insert(2, ["routing agreement", f"{result['routing_agreement']:.6f}"])
    data = result["data"]
    console.table(f"{data['name']}, {data['tokens']:,} tokens in windows of {data['seq_len']}", ["", ""], rows)
    if "quantized" in result:
        found = result["quantized"]
        sides_table(found["side"], [{**found, "name": data["name"]}])
    shares = {name: unit["routing_agreement"] for name, unit in result.get("units", {}).items()}
    if shares and min(shares.values()) < 1:
        cells = [[name, f"{share:.6f}"] for name, share in shares.items() if share < 1]
        console.table("units whose routes differ somewhere", ["unit", "agreement"], cells)
