"""The options that commands share, as decorators, so that a flag means the same everywhere.

A command stacks them over its function, `@common_options` last. Each docstring names the argument that is passed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
from click.shell_completion import CompletionItem

from irc.devices import NAMES, is_device
from irc.dtypes import LONG_NAMES

Decorated = TypeVar("Decorated", bound=Callable[..., Any] | click.Command)


class Decorator(Protocol):
    """A decorator that adds an option to a function or a command."""

    def __call__(self, function: Decorated, /) -> Decorated:
        """Return the function with the option added."""


@dataclass
class Session:
    """The state of one run of the command line; click carries it as `ctx.obj`."""

    debug: bool = False
    wants_json: bool = False
    """Whether the command's arguments hold `--json`; known before they are parsed."""
    flags: dict[str, str] = field(default_factory=dict)
    """The flag of every option of the running command, by the name of its parameter."""


def files(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete file and folder names, for values that may also be something else."""
    return [CompletionItem(incomplete, type="file")]


def common_options(function: Decorated) -> Decorated:
    """Add the options of every command: --json (argument `as_json`) and --debug (no argument)."""
    return json_option()(debug_option()(function))


def json_option() -> Decorator:
    """Add --json: stdout holds one JSON object. Argument `as_json: bool`."""

    def switch(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        if value:
            from irc import console

            console.set_json_mode(True)
        return value

    text = "Print one JSON object on stdout, everything else on stderr."
    return click.option("--json", "as_json", is_flag=True, is_eager=True, callback=switch, help=text)


def debug_option() -> Decorator:
    """Add --debug: tracebacks and the detailed log. Passes no argument."""

    def switch(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(Session).debug = True
            for name in ("irc", "exporters", "passes"):
                logging.getLogger(name).setLevel(logging.DEBUG)

    text = "Show tracebacks and a detailed log."
    return click.option("--debug", is_flag=True, is_eager=True, expose_value=False, callback=switch, help=text)


def output_option(help_text: str, *, required: bool = False) -> Decorator:
    """Add -o/--output. Argument `output: Path`, or `Path | None` where it is not required."""
    kind = click.Path(path_type=Path)
    return click.option(
        "-o",
        "--output",
        type=kind,
        required=required,
        callback=lambda ctx, parameter, value: value and Path(os.path.expanduser(value)),
        metavar="PATH",
        help=help_text,
    )


_TEXT = (
    "Text to read: a file, a folder, a table (.jsonl, .json, .csv or .parquet) of texts or conversations, hf:NAME, "
    "or stdlib (the source code of Python's standard library)."
)


def data_option(default: str | None = "stdlib") -> Decorator:
    """Add --data, a text for `irc.text.source.load_text`.

    Argument `data: str`, or `str | None` if `default` is None.
    """
    return click.option("--data", default=default, show_default=True, metavar="TEXT", help=_TEXT, shell_complete=files)


def texts_options(function: Decorated) -> Decorated:
    """Add --data, repeatable, and --data-weights. Arguments of these names: lists, may be empty."""
    data = click.option(
        "--data",
        multiple=True,
        callback=lambda ctx, parameter, value: list(value),
        metavar="TEXT",
        help=f"{_TEXT} Also self (what the model writes itself). Repeat it to mix texts. "
        "[default: as in the recipe file; without one, self and stdlib, for the demo stdlib]",
        shell_complete=files,
    )
    weights = click.option(
        "--data-weights",
        default="",
        callback=_weights,
        metavar="LIST",
        help="Share of each text in the mixture, in proportion, such as 2,1. [default: equal shares]",
    )
    return data(weights(function))


def _weights(ctx: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    try:
        return [float(part) for part in value.split(",")] if value else []
    except ValueError:
        raise click.BadParameter(f"'{value}' is not a list of numbers; use for example 2,1", ctx, parameter) from None


def also_option() -> Decorator:
    """Add --also, further texts to measure on. Argument `also: tuple[str, ...]`."""
    text = "Also measure on this text (given as for --data), read whole; repeatable."
    return click.option("--also", multiple=True, metavar="NAME=TEXT", help=text)


def seed_option(default: int | None = 0) -> Decorator:
    """Add --seed. Argument `seed: int`, or `int | None` if `default` is None."""
    kind = click.IntRange(0, 2**32 - 1)
    return click.option("--seed", type=kind, default=default, show_default=True, metavar="N", help="Random seed.")


def device_option(default: str = "auto") -> Decorator:
    """Add --device. Argument `device: str`: auto, cpu, cuda, cuda:N or mps, not yet checked to exist."""
    text = "Device: auto (a GPU if there is one), cpu, cuda, cuda:N or mps."
    return click.option(
        "--device", default=default, show_default=True, callback=_check_device, metavar="NAME", help=text
    )


def _check_device(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    if not is_device(value):
        raise click.BadParameter(f"unknown device '{value}'; use {NAMES}", ctx, parameter)
    return value


def provider_option(default: str = "auto") -> Decorator:
    """Add --provider. Argument `provider: str`: auto, cpu or cuda."""
    text = "ONNX Runtime execution provider: auto (CUDA if it loads), cpu or cuda."
    kind = click.Choice(["auto", "cpu", "cuda"])
    return click.option("--provider", type=kind, default=default, show_default=True, help=text)


def ops_option() -> Decorator:
    """Add --ops. Argument `ops: str`: auto, native, portable or the path of an operator library."""
    text = (
        "Kernels for irc's own operators: native (the installed library), portable (standard operators), auto "
        "(native if it is installed and fits), or the path of a library."
    )
    return click.option("--ops", default="auto", show_default=True, metavar="NAME", help=text)


def dtype_option(default: str = "auto", more: Sequence[str] = (), also: str = "") -> Decorator:
    """Add --dtype. Argument `dtype: str`: auto or the name of a torch dtype; fp32, fp16 and bf16 are accepted.

    Args:
        default: The default.
        more: Further types that the command takes.
        also: What the help says of them.
    """
    kind = click.Choice(["auto", *LONG_NAMES.values(), *LONG_NAMES, *more])
    return click.option(
        "--dtype",
        type=kind,
        default=default,
        show_default=True,
        callback=lambda ctx, parameter, value: LONG_NAMES.get(value, value),
        metavar="NAME",
        help="Data type: auto (that of the bundle's conversion; otherwise fp32, or bf16 for checkpoints over 2 GB), "
        f"float32 (fp32), float16 (fp16) or bfloat16 (bf16).{also}",
    )


def key_policy_options(function: Decorated) -> Decorated:
    """Add --kv-policy and --kv-threshold. Arguments `kv_policy: str | None`, `kv_threshold: float | None`."""
    policy = click.option(
        "--kv-policy",
        type=click.Choice(["full", "reduced"]),
        help="Store the keys and values of every token (full), or leave out tokens that often-skipping attention units "
        "skip (reduced). [default: the bundle's]",
    )
    threshold = click.option(
        "--kv-threshold",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="reduced: affects attention units that skip at least this share of the calibration text. [default: 0.5]",
    )
    return policy(threshold(function))


def target_options(function: Decorated) -> Decorated:
    """Add --flops and --sparsity, which adjust a bundle's thresholds. Arguments of these names, `float | None`."""
    flops = (
        "FLOPs ratio, routed over dense, within the range of a dial that was made for FLOPs. [default: as converted]"
    )
    sparsity = (
        "Fraction of (token, unit) pairs to approximate, within the range of the bundle's dial. [default: as converted]"
    )
    add_flops = click.option("--flops", type=click.FloatRange(0, 1), metavar="RATIO", help=flops)
    return add_flops(click.option("--sparsity", type=click.FloatRange(0, 1), metavar="SHARE", help=sparsity)(function))


def seq_len_option(default: int | None = 512) -> Decorator:
    """Add --seq-len. Argument `seq_len: int`, or `int | None` if `default` is None."""
    return click.option(
        "--seq-len",
        type=click.IntRange(min=2),
        default=default,
        show_default=True,
        metavar="N",
        help="Tokens per window of text.",
    )


def fraction_list(ctx: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    """Read a comma-separated list of fractions from 0 to 1; an option's callback."""
    try:
        found = [float(part) for part in value.split(",")] if value else []
    except ValueError:
        found = [-1.0]
    if not all(0 <= share <= 1 for share in found):
        raise click.BadParameter(
            f"'{value}' is not a list of fractions from 0 to 1; use for example 0.25,0.5", ctx, parameter
        )
    return found


def number_list(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    """Read a comma-separated list of positive whole numbers; an option's callback."""
    try:
        found = [int(part) for part in value.split(",")] if value else []
    except ValueError:
        found = [0]
    if not all(number > 0 for number in found):
        raise click.BadParameter(
            f"'{value}' is not a list of positive whole numbers; use for example 10,25,50", ctx, parameter
        )
    return found


def name_list(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    """Read a comma-separated list of names; an option's callback. None if the option is not given."""
    return None if value is None else [part.strip() for part in value.split(",") if part.strip()]


def force_option() -> Decorator:
    """Add --force. Argument `force: bool`."""
    return click.option("--force", is_flag=True, help="Replace what is at --output.")


def resume_option() -> Decorator:
    """Add --resume. Argument `resume: bool`."""
    return click.option("--resume", is_flag=True, help="Continue the unfinished work at --output.")
