"""`irc bench`: what routing gains in wall-clock time, against what its FLOPs promise."""

from __future__ import annotations

import click

from irc.cli.options import Decorator, common_options, ops_option, provider_option, seed_option, shares


def _size(name: str, default: int, text: str) -> Decorator:
    return click.option(
        f"--{name}", type=click.IntRange(min=1), default=default, show_default=True, metavar="N", help=text
    )


@click.command()
@click.option(
    "--sparsities",
    default="0.25,0.4,0.5,0.7",
    show_default=True,
    callback=shares,
    metavar="LIST",
    help="Shares of skipped (token, unit) pairs.",
)
@_size("hidden", 1024, "Hidden size.")
@_size("layers", 8, "Decoder layers.")
@_size("ffn", 2816, "Size inside the FFN.")
@_size("heads", 16, "Attention heads.")
@_size("kv-heads", 16, "Key/value heads.")
@_size("prefill", 512, "Tokens of the timed prefill.")
@_size("past", 128, "Tokens in the cache before decoding.")
@_size("decode", 64, "Timed decode steps of one token.")
@_size("rounds", 7, "Timed rounds; medians count.")
@provider_option()
@ops_option()
@seed_option()
@common_options
def command(sparsities: list[float], provider: str, ops: str, seed: int, as_json: bool, **sizes: int) -> None:
    """Time a Llama with random weights on ONNX Runtime, dense and routed by random masks, in turns.

    Both go through the same export. Routers, compaction and forecasters are in the routed time. The ideal is what
    the FLOPs (prefill) or the bytes read (decode) promise; efficiency is the measured speed-up over it.
    """
    from irc import console
    from irc.bench import Load, Shape, bench

    shape = Shape(*(sizes[name] for name in ("hidden", "layers", "ffn", "heads", "kv_heads")))
    load = Load(*(sizes[name] for name in ("prefill", "past", "decode", "rounds")))
    result = bench(shape, sparsities, load, console.progress, provider, seed, ops)
    if as_json:
        console.emit_json(result)
        return
    headings = ["skipped", "dense ms", "routed ms", "speed-up", "ideal", "efficiency"]
    for name, title in (
        ("prefill", f"prefill of {load.prefill} tokens"),
        ("decode", f"decode, one token after {load.past}"),
    ):
        rows = [
            [
                f"{row['sparsity']:.0%}",
                f"{row[name]['dense_ms']:.2f}",
                f"{row[name]['routed_ms']:.2f}",
                f"{row[name]['speedup']:.3f}",
                f"{row[name]['ideal']:.3f}",
                f"{row[name]['efficiency']:.3f}",
            ]
            for row in result["results"]
        ]
        console.table(f"{title}, {result['provider']}, {result['ops']} operators", headings, rows)
