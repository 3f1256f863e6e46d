"""The options that verbs share, each a decorator, so that a flag means the same everywhere.

A verb stacks them over its function, `@common_options` last; each says which argument it passes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
from click.shell_completion import CompletionItem

from irc.devices import NAMES, is_device
from irc.dtypes import LONG_NAMES

Decorated = TypeVar("Decorated", bound=Callable[..., Any] | click.Command)


class Decorator(Protocol):
    """What adds an option to a function or a command."""

    def __call__(self, function: Decorated, /) -> Decorated:
        """Return the function with the option added."""


@dataclass
class Session:
    """What holds for one run of the command line, whichever verb runs; click carries it as `ctx.obj`."""

    debug: bool = False
    wants_json: bool = False
    """Whether the arguments of the verb hold `--json`, known before they are parsed."""


def files(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete the name of a file or folder; for values that may be something else too."""
    return [CompletionItem(incomplete, type="file")]


def common_options(function: Decorated) -> Decorated:
    """Add what every verb has: --json (argument `as_json`) and --debug (no argument)."""
    return json_option()(debug_option()(function))


def json_option() -> Decorator:
    """Add --json: stdout carries one JSON object. Argument `as_json: bool`."""

    def switch(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        if value:
            from irc import console

            console.set_json_mode(True)
        return value

    text = "Print one JSON object on stdout and everything else on stderr."
    return click.option("--json", "as_json", is_flag=True, is_eager=True, callback=switch, help=text)


def debug_option() -> Decorator:
    """Add --debug: tracebacks and the detailed log. The function gets no argument for it."""

    def switch(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(Session).debug = True
            for name in ("irc", "exporters", "passes"):
                logging.getLogger(name).setLevel(logging.DEBUG)

    text = "Show tracebacks and the detailed log."
    return click.option("--debug", is_flag=True, is_eager=True, expose_value=False, callback=switch, help=text)


def output_option(help_text: str, *, required: bool = False) -> Decorator:
    """Add -o/--output. Argument `output: Path`, or `Path | None` where it is not required."""
    kind = click.Path(path_type=Path)
    return click.option("-o", "--output", type=kind, required=required, metavar="PATH", help=help_text)


def data_option(default: str | None = "stdlib") -> Decorator:
    """Add --data, what `irc.text.source.load_text` reads. Argument `data: str`, or `str | None` by a None default."""
    text = (
        "Text: a file, a folder, a .jsonl or .parquet file with a text column, hf:NAME, or stdlib "
        "(the sources of the running Python's standard library)."
    )
    return click.option("--data", default=default, show_default=True, metavar="TEXT", help=text, shell_complete=files)


def seed_option(default: int | None = 0) -> Decorator:
    """Add --seed. Argument `seed: int`, or `int | None` by a None default."""
    kind = click.IntRange(0, 2**32 - 1)
    return click.option(
        "--seed", type=kind, default=default, show_default=True, metavar="N", help="Seed of all random numbers."
    )


def device_option(default: str = "auto") -> Decorator:
    """Add --device. Argument `device: str`: auto, cpu, cuda, cuda:N or mps, not yet checked for presence."""
    text = "auto (a GPU where there is one), cpu, cuda, cuda:N or mps."
    return click.option(
        "--device", default=default, show_default=True, callback=_check_device, metavar="NAME", help=text
    )


def _check_device(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    if not is_device(value):
        raise click.BadParameter(f"'{value}' is no device; use {NAMES}", ctx, parameter)
    return value


def provider_option(default: str = "auto") -> Decorator:
    """Add --provider. Argument `provider: str`: auto, cpu or cuda, of ONNX Runtime."""
    text = "ONNX Runtime's execution provider: auto (CUDA where it really loads), cpu or cuda."
    kind = click.Choice(["auto", "cpu", "cuda"])
    return click.option("--provider", type=kind, default=default, show_default=True, help=text)


def ops_option() -> Decorator:
    """Add --ops. Argument `ops: str`: auto, native, portable or the path of an operator library."""
    text = (
        "Kernels of the operators of domain irc: native (the installed library), portable (standard operators), auto "
        "(native where it is installed and fits), or the path of a library."
    )
    return click.option("--ops", default="auto", show_default=True, metavar="NAME", help=text)


def dtype_option(default: str = "auto") -> Decorator:
    """Add --dtype. Argument `dtype: str`: auto or the name of a torch dtype; fp32, fp16, bf16 are understood."""
    kind = click.Choice(["auto", *LONG_NAMES.values(), *LONG_NAMES])
    return click.option(
        "--dtype",
        type=kind,
        default=default,
        show_default=True,
        callback=lambda ctx, parameter, value: LONG_NAMES.get(value, value),
        metavar="NAME",
        help="auto (a bundle's as it was converted; else fp32, or bf16 for a checkpoint of over 2 GB), float32 (fp32), "
        "float16 (fp16) or bfloat16 (bf16).",
    )


def key_policy_options(function: Decorated) -> Decorated:
    """Add --kv-policy and --kv-threshold. Arguments `kv_policy: str | None`, `kv_threshold: float | None`."""
    policy = click.option(
        "--kv-policy",
        type=click.Choice(["full", "reduced"]),
        help="Keys and values of every token (full), or not of tokens that strongly skipping attention units skip "
        "(reduced). [default: the bundle's]",
    )
    threshold = click.option(
        "--kv-threshold",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="reduced: attention units that skip at least this share of the calibration text. [default: 0.5]",
    )
    return policy(threshold(function))


def sparsity_option() -> Decorator:
    """Add --sparsity, which turns a bundle's dial. Argument `sparsity: float | None`."""
    text = "Share of (token, unit) pairs to approximate, within the bundle's dial. [default: as converted]"
    return click.option("--sparsity", type=click.FloatRange(0, 1), metavar="SHARE", help=text)


def seq_len_option(default: int | None = 512) -> Decorator:
    """Add --seq-len, tokens a window. Argument `seq_len: int`, or `int | None` by a None default."""
    return click.option(
        "--seq-len",
        type=click.IntRange(min=2),
        default=default,
        show_default=True,
        metavar="N",
        help="Tokens a window of text.",
    )


def shares(ctx: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    """Read a comma-separated list of shares of 0 to 1; the callback of options that take one."""
    try:
        found = [float(part) for part in value.split(",")] if value else []
    except ValueError:
        found = [-1.0]
    if not all(0 <= share <= 1 for share in found):
        raise click.BadParameter(f"'{value}' is no list of shares; give some such as 0.25,0.5", ctx, parameter)
    return found


def numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    """Read a comma-separated list of positive whole numbers; the callback of options that take one."""
    try:
        found = [int(part) for part in value.split(",")] if value else []
    except ValueError:
        found = [0]
    if not all(number > 0 for number in found):
        raise click.BadParameter(f"'{value}' is no list of numbers; give some such as 10,25,50", ctx, parameter)
    return found


def words(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    """Read a comma-separated list of names; the callback of options that take one. None where none was given."""
    return None if value is None else [part.strip() for part in value.split(",") if part.strip()]


def force_option() -> Decorator:
    """Add --force. Argument `force: bool`."""
    return click.option("--force", is_flag=True, help="Overwrite what is at --output.")


def resume_option() -> Decorator:
    """Add --resume. Argument `resume: bool`."""
    return click.option("--resume", is_flag=True, help="Continue from the last checkpoint at --output.")
