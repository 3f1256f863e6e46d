"""The group of verbs, and `main`: from the arguments to an exit code.

A verb is one file of this package that exposes `command`. Listing the verbs imports none of them, and
no verb imports torch or transformers outside its function's body, so that help is immediate.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import click

from irc import __version__
from irc.cli.options import Session, debug_option
from irc.errors import IrcError

VERBS = {
    "convert": "Add routers and forecasters to a model and train them.",
    "export": "Write a bundle or a model as an ONNX folder.",
    "verify": "Compare an ONNX folder with the PyTorch model it came from.",
    "generate": "Continue a prompt with an exported model.",
    "bench": "Time dense against routed on ONNX Runtime.",
    "eval": "Measure a bundle's perplexity, sparsity and FLOPs.",
    "compare": "Hold routing policies against each other.",
    "inspect": "Show the units of a model or bundle and what each skips.",
    "env": "Show versions, devices and providers that really work.",
}
"""Every verb (the file of that name in this package) and its line in `irc --help`."""

_LONGEST_MESSAGE = 500


class LazyGroup(click.Group):
    """A group that imports a verb's file only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of work."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a verb's file and return its `command`; None for an unknown verb."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"irc.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs from the table."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb that the arguments name.

        Raises:
            click.UsageError: There is none; the message suggests the nearest.
        """
        name = args[0]
        if name in VERBS or name.startswith("-"):
            ctx.ensure_object(Session).wants_json = "--json" in args
            return super().resolve_command(ctx, args)
        near = get_close_matches(name, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(VERBS)}"
        raise click.UsageError(f"no such command '{name}'; {hint}", ctx=ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="irc")
@debug_option()
def group() -> None:
    """Teach a dense decoder language model which tokens need which of its units, and skip the rest."""


@dataclass(frozen=True)
class _Failure:
    message: str
    exit_code: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; by default those of the process.

    Returns:
        0 done, 1 failed, 2 wrong usage or input, 3 a gate that the user set was missed.
    """
    from irc import console

    console.set_json_mode(False)
    if sys.stderr is None:  # the caller closed it (2>&-)
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)
    if sys.stdout is None:
        console.fail("stdout is closed, so there is nowhere to write; send it to a file, or to /dev/null")
        return 1
    _quiet_libraries()
    session = Session()
    _end_cleanly()
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        result = group.main(given or ["--help"], prog_name="irc", standalone_mode=False, obj=session)
        sys.stdout.flush()
        return result if type(result) is int else 0  # click returns the code of ctx.exit(code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has gone
        return 1
    except (Exception, KeyboardInterrupt) as error:
        failure = _failure(error)
        if session.debug:
            console.note(traceback.format_exc().rstrip())
        console.fail(failure.message)
        return failure.exit_code


def _failure(error: BaseException) -> _Failure:
    """Turn any exception into one sentence and an exit code."""
    if isinstance(error, IrcError):
        return _Failure(str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _Failure("interrupted", 1)
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "irc"
        return _Failure(f"{_one_line(error.format_message()).rstrip('.')} (see '{path} --help')", 2)
    if isinstance(error, click.ClickException):
        return _Failure(_one_line(error.format_message()), 2)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno == errno.ENAMETOOLONG:
            return _Failure(_one_line(place + error.strerror), 2)
        return _Failure(f"{_one_line(place + error.strerror)} (--debug shows the traceback)", 1)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return _Failure(f"package {package} is not installed; pip install informed-routing-compiler installs it", 1)
    message = _one_line(str(error))
    name = type(error).__name__
    return _Failure(f"{name}: {message or 'no message'} (--debug shows the traceback)", 1)


def _one_line(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 2] + " …"


def _end_cleanly() -> None:
    """Let a request to end (SIGTERM) unwind like an interrupt does, so that no half-written folder stays."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _quiet_libraries() -> None:
    """Keep other libraries' chatter off the screen, and our own log on stderr, above any live bar."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)

    from irc.console import ConsoleHandler

    for name in ("irc", "exporters", "passes"):
        log = logging.getLogger(name)
        log.handlers = [ConsoleHandler()]
        log.setLevel(logging.INFO)
        log.propagate = False
