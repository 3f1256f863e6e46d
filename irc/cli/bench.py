"""`irc bench`: measures how much faster routing is, and compares that with the saved FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from irc.cli.options import (
    Decorator,
    common_options,
    files,
    fraction_list,
    name_list,
    number_list,
    provider_option,
    seed_option,
)

if TYPE_CHECKING:
    from irc.bench import Share

_SIZES = {"hidden": 1024, "layers": 8, "ffn": 2816, "heads": 16, "kv_heads": 16}
_PHASES = {"prefill": "prefill of {tokens} tokens", "decode": "decode, one token per sequence after {tokens}"}


def _size(name: str, text: str) -> Decorator:
    default = _SIZES[name.replace("-", "_")]
    return click.option(f"--{name}", type=click.IntRange(min=1), metavar="N", help=f"{text}  [default: {default}]")


def _count(name: str, default: int, text: str) -> Decorator:
    kind = click.IntRange(min=1)
    return click.option(f"--{name}", type=kind, default=default, show_default=True, metavar="N", help=text)


def _numbers(name: str, target: str, default: str, text: str) -> Decorator:
    return click.option(
        f"--{name}", target, default=default, show_default=True, callback=number_list, metavar="LIST", help=text
    )


def _shares(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[Share] | None:
    """Read fractions such as 0.25, or 0.1/0.4 for attention and FFN units."""
    if value is None or ctx.resilient_parsing:  # shell completion must not wait for torch to be imported
        return None
    from irc.bench import Share

    found = []
    for part in value.split(",") if value else []:
        try:
            attention, *rest = (float(number) for number in part.split("/"))
            (ffn,) = rest or [attention]
        except ValueError:
            attention = ffn = -1.0
        if not (0 <= attention <= 1 and 0 <= ffn <= 1):
            example = "0.25,0.5, or 0.1/0.4 for attention and FFN units"
            raise click.BadParameter(f"'{value}' is not a list of fractions; use for example {example}", ctx, parameter)
        found.append(Share(attention, ffn))
    return found


@click.command()
@click.argument("bundle", required=False, default="", shell_complete=files)
@click.option(
    "--sparsities",
    callback=_shares,
    metavar="LIST",
    help="Fractions of (token, unit) pairs to skip, each a number or two such as 0.1/0.4 for attention and FFN; for a "
    "bundle, within the range of its dial.  [default: 0.25,0.4,0.5,0.7; a bundle's own]",
)
@click.option(
    "--flops",
    default="",
    callback=fraction_list,
    metavar="LIST",
    help="FLOPs ratios to set a bundle to, within the range of a dial that was made for FLOPs.",
)
@click.option(
    "--shape", metavar="NAME", help="Take all sizes from llama-3.2-1b, llama-3.2-3b, llama-3.1-8b or a config.json."
)
@_size("hidden", "Hidden size.")
@_size("layers", "Decoder layers.")
@_size("ffn", "FFN size.")
@_size("heads", "Attention heads.")
@_size("kv-heads", "Key/value heads.")
@click.option(
    "--data", metavar="TEXT", help="Text whose held-out part a bundle reads.  [default: that of its conversion]"
)
@_numbers("batch", "batches", "1", "Batch sizes.")
@_numbers("decode-batch", "decode_batches", "", "Batch sizes for decoding, if different.")
@_numbers("prefill", "prefill", "512", "Prompt lengths to time, in tokens.")
@_count("past", 128, "Tokens in the cache before decoding.")
@_count("decode", 64, "Decoding steps to time.")
@_count("rounds", 7, "Timed rounds; the median is reported.")
@provider_option()
@click.option(
    "--dtype", default="fp32", show_default=True, metavar="NAME", help="Data type: fp32, fp16, bf16, int4 or int8."
)
@click.option(
    "--ops",
    default="auto",
    show_default=True,
    callback=name_list,
    metavar="LIST",
    help="Kernels for irc's own operators, each timed: native, portable, auto, or the path of a library.",
)
@click.option(
    "--peers",
    default="",
    callback=name_list,
    metavar="LIST",
    help="Also time static (the same share of layers removed), hf-eager and hf-compiled (transformers), genai "
    "(its own dense build), and llama.cpp (the dense weights as GGUF).",
)
@click.option("--profile", is_flag=True, help="Also show the time per operator.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Write a plot of the speed-ups (SVG).")
@seed_option()
@common_options
def command(
    bundle: str,
    sparsities: list[Share] | None,
    flops: list[float],
    shape: str | None,
    data: str | None,
    batches: list[int],
    decode_batches: list[int],
    prefill: list[int],
    past: int,
    decode: int,
    rounds: int,
    provider: str,
    dtype: str,
    ops: list[str],
    peers: list[str],
    profile: bool,
    plot: Path | None,
    seed: int,
    as_json: bool,
    **sizes: int | None,
) -> None:
    """Time a routed model and its dense original on ONNX Runtime, in alternation.

    With BUNDLE, the model follows its own routes on held-out text. Without it, a Llama with random weights follows
    random routes. Both models go through the same export. The routed time includes routers, compaction and
    forecasters. The ideal speed-up follows from the FLOPs (prefill) or the bytes read (decode); efficiency is the
    measured speed-up divided by it.
    """
    from irc import console
    from irc.bench import BenchOptions, Load, Share, Subject, bench
    from irc.bench.plot import speedup_plot
    from irc.bench.shapes import Shape, shape_named
    from irc.errors import InputError

    given = {name: value for name, value in sizes.items() if value is not None}
    if bundle and (shape or given):
        raise InputError(f"{bundle}: a bundle has its own sizes; leave out --shape and the size options")
    if shape and given:
        raise InputError(f"--shape {shape} sets all sizes; leave out --{next(iter(given)).replace('_', '-')}")
    if data and not bundle:
        raise InputError("--data applies to a bundle only; give a BUNDLE or leave it out")
    if flops and not bundle:
        raise InputError("--flops sets the dial of a bundle; give a BUNDLE or leave it out")
    if sparsities is None:
        sparsities = [] if bundle else [Share(share, share) for share in (0.25, 0.4, 0.5, 0.7)]
    text = None
    if bundle:
        from irc.bench.text import heldout_tokens

        text = heldout_tokens(bundle, data)
    if plot and (plot.is_dir() or not plot.parent.is_dir()):
        raise InputError(f"--plot {plot}: cannot be written; give a file in an existing folder")
    subject = Subject(shape_named(shape) if shape else Shape(**{**_SIZES, **given}), bundle, text, flops)
    load = Load(tuple(batches), tuple(prefill), tuple(decode_batches), past, decode, rounds)
    options = BenchOptions(provider, dtype, ops, peers, profile, seed)
    result = bench(subject, sparsities, load, console.progress, options)
    if plot:
        try:
            plot.write_text(speedup_plot(result), encoding="utf-8")
        except OSError as error:
            raise InputError(f"--plot {plot}: cannot be written ({error.strerror}); give another file") from error
    if as_json:
        console.emit_json(result)
        return
    _show(result)
    if plot:
        console.say(f"{plot}: written")


UNFAIR = 1.05
"""Skipping cannot bring more than the work that it saves; what exceeds that by more than noise has another cause."""


def _show(result: dict[str, Any]) -> None:
    """Print one table per phase, batch size and length, then the profile."""
    from irc import console

    headings = ["skipped", "model", "ms", "spread", "tokens/s", "speed-up", "ideal", "efficiency"]
    places = dict.fromkeys((row["phase"], row["batch"], row["tokens"]) for row in result["results"])
    for phase, batch, tokens in places:
        rows = [
            row for row in result["results"] if (row["phase"], row["batch"], row["tokens"]) == (phase, batch, tokens)
        ]
        title = f"{_PHASES[phase].format(tokens=tokens)}, batch {batch}, {result['provider']}, {result['dtype']}"
        console.table(title, headings, [line for row in rows for line in _lines(row)])
        if any(figures.get("efficiency", 0) > UNFAIR for row in rows for figures in row["contenders"].values()):
            console.warn(
                f"an efficiency above {UNFAIR:g} says that the dense model lacks something that the routed one has, or "
                "that the machine was busy: do not quote it"
            )
    for entry in result["profile"]:
        title = f"time per operator: {entry['model']}, {entry['phase']}"
        title += "" if entry["sparsity"] is None else f", {entry['sparsity']:.0%} skipped"
        total = sum(operator["ms"] for operator in entry["operators"])
        rows = [
            [operator["name"], f"{operator['calls']:.0f}", f"{operator['ms']:.3f}", f"{operator['ms'] / total:.1%}"]
            for operator in entry["operators"][:12]
        ]
        console.table(title, ["operator", "calls", "ms", "share"], rows)
    console.say(f"{result['cores']} cores, peak memory {result['peak_memory_mib']:,} MiB")


def _lines(row: dict[str, Any]) -> list[list[str]]:
    lines = []
    for name, figures in row["contenders"].items():
        judged = [f"{figures[key]:.3f}" if key in figures else "" for key in ("speedup", "ideal", "efficiency")]
        lines.append(
            [
                f"{row['realized']:.1%}" if name == "dense" else "",
                name,
                f"{figures['ms']:.2f}",
                f"{figures['spread']:.1%}",
                f"{figures['tokens_per_s']:,.0f}",
                *judged,
            ]
        )
    return lines
