"""`irc generate`: continue a prompt with an exported model, streaming."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from irc.cli.options import common_options, ops_option, provider_option, seed_option
from irc.errors import InputError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, metavar="N", help="New tokens."
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0 takes the likeliest token."
)
@click.option(
    "--top-k",
    type=int,
    default=0,
    show_default=True,
    metavar="K",
    help="Sample from the K likeliest tokens; 0 from all.",
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    metavar="P",
    help="Sample from the likeliest tokens that together have this probability.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; repeatable.")
@provider_option()
@ops_option()
@seed_option()
@common_options
def command(folder: Path, prompt: str, as_json: bool, max_tokens: int, stop: tuple[str, ...], **flags: Any) -> None:
    """Continue PROMPT (- reads it from stdin) with FOLDER, the output of irc export. Ctrl-C ends the text cleanly."""
    from irc import console
    from irc.runtime.generation import Generator, Sampling
    from irc.runtime.session import Runtime

    provider, ops = flags.pop("provider"), flags.pop("ops")
    sampling = Sampling(**flags)
    sampling.check()
    prompt = _read_stdin() if prompt == "-" else prompt
    generator = Generator(Runtime(folder, provider, ops=ops))
    generator.encode(prompt)  # refuses a prompt that cannot be continued before anything is printed
    emit: Callable[[str], None] = (lambda _: None) if as_json else console.stream
    try:
        if not as_json:
            console.stream(prompt, style="dim")
        result = generator.generate(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, emit=emit)
    except BaseException:
        emit("\n")  # the error is a line of its own
        raise
    figures = {
        "provider": generator.runtime.provider,
        "ops": generator.runtime.ops,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.tokens),
        "stopped": result.stopped,
        "tokens_per_s": round(result.tokens_per_s, 2),
        "prefill_ms": round(1e3 * result.prefill_seconds, 2),
        "skipped": round(result.skipped, 4),
        "kv_saved": round(result.kv_saved, 4),
    }
    if as_json:
        console.emit_json({"model": str(folder), "text": result.text, "tokens": result.tokens, **figures})
        return
    console.stream("\n")
    reduced = bool(generator.runtime.exported.cache.reduced)
    memory = f"{result.kv_saved:.1%} of keys and values not stored, " if reduced else ""
    console.note(
        f"{len(result.tokens)} tokens ({result.stopped}), {result.tokens_per_s:.1f} tokens/s after "
        f"{1e3 * result.prefill_seconds:.0f} ms, {result.skipped:.1%} of the units' work skipped, "
        f"{memory}{generator.runtime.provider}, {generator.runtime.ops} operators"
    )


def _read_stdin() -> str:
    """Return the text on stdin without its last line end, as a shell passes the output of a command."""
    from irc import console

    if sys.stdin.isatty():
        console.note("reading the prompt from stdin; end it with Ctrl-D")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: not UTF-8 text (at byte {error.start}); convert it to UTF-8") from error
    return text.removesuffix("\n").removesuffix("\r")
