"""The command line: the group of commands, and `main`, which turns arguments into an exit code.

Each command is a file of this package that defines `command`. Listing the commands imports none of them, and no
command imports torch or transformers outside of its function, so that help appears at once.
"""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import click

from irc import __version__
from irc.cli.options import Session, debug_option
from irc.errors import Interrupted, IrcError

COMMANDS = {
    "convert": "Add routers and forecasters to a model and train them.",
    "export": "Write a bundle or a model as an ONNX folder.",
    "verify": "Compare an ONNX folder with the PyTorch model it came from.",
    "generate": "Generate text with an exported model.",
    "bench": "Time the routed model and the dense one on ONNX Runtime.",
    "eval": "Measure a bundle's perplexity, sparsity and FLOPs.",
    "compare": "Compare routing policies.",
    "inspect": "Show the units of a model or bundle and what each one skips.",
    "env": "Show versions, devices and the providers that work.",
}
"""Every command (a file of that name in this package) with its line in `irc --help`."""

_LONGEST_MESSAGE = 500


class LazyGroup(click.Group):
    """A group that imports a command's file only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which people use them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command's file and return its `command`; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"irc.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name.

        Raises:
            click.UsageError: There is no such command; the message suggests the nearest.
        """
        name = args[0]
        if name in COMMANDS or name.startswith("-"):
            session = ctx.ensure_object(Session)
            session.wants_json = "--json" in args
            found = super().resolve_command(ctx, args)
            session.flags = _flags(found[1])
            return found
        near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(COMMANDS)}"
        raise click.UsageError(f"unknown command '{name}'; {hint}", ctx=ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="irc")
@debug_option()
def group() -> None:
    """Teach a language model to skip the attention and FFN units that a token does not need."""


@dataclass(frozen=True)
class _Failure:
    message: str
    exit_code: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; by default those of this process.

    Returns:
        0 for success, 1 for a failure, 2 for wrong usage or input, 3 for a missed limit that the user set, 130 for an
        interrupt (Ctrl-C).
    """
    from irc import console

    console.set_json_mode(False)
    if sys.stderr is None:  # closed by the caller (2>&-)
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (stays open until the process ends)
    if sys.stdout is None:
        console.fail("stdout is closed; redirect it to a file or to /dev/null")
        return 1
    _escape_unknown_letters()
    _quiet_libraries()
    session = Session()
    given = sys.argv[1:] if arguments is None else list(arguments)
    _end_cleanly()
    try:
        result = group.main(given or ["--help"], prog_name="irc", standalone_mode=False, obj=session)
        sys.stdout.flush()
        return result if type(result) is int else 0  # click returns the code of ctx.exit(code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has exited
        return 1
    except (Exception, KeyboardInterrupt) as error:
        failure = _failure(error, session.flags, given)
        if session.debug:
            console.note(traceback.format_exc().rstrip())
        console.fail(failure.message)
        return failure.exit_code


def _flags(command: click.Command | None) -> dict[str, str]:
    """Return the long flag of every option of a command, by the name of its parameter."""
    options = [each for each in command.params if isinstance(each, click.Option)] if command else []
    return {each.name: max(each.opts, key=len) for each in options if each.name}


def _failure(error: BaseException, flags: Mapping[str, str], arguments: Sequence[str]) -> _Failure:
    """Turn any exception into a one-line message and an exit code."""
    if isinstance(error, IrcError):
        helpful = [flag for name in error.options if (flag := _flag_of(name, flags))]
        return _Failure(f"{error} ({', '.join(helpful)})" if helpful else str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _Failure(_interrupted(error, arguments), 128 + signal.SIGINT)
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


def _interrupted(error: BaseException, arguments: Sequence[str]) -> str:
    """Say where an interrupt stopped the work, from the whole to its parts, and which command resumes it."""
    places: list[str] = []
    can_resume = False
    cause: BaseException | None = error
    while cause is not None:  # click puts its own exception around the interrupt
        places += reversed(getattr(cause, "__notes__", []))
        can_resume = can_resume or isinstance(cause, Interrupted)
        cause = cause.__cause__
    where = f" in {', '.join(places)}" if places else ""
    if not can_resume:
        return f"interrupted{where}"
    kept = [each for each in arguments if each not in ("--force", "--resume")]
    return f"interrupted{where}; resume with: {shlex.join(['irc', *kept, '--resume'])}"


def _flag_of(name: str, flags: Mapping[str, str]) -> str:
    """Return how the running command sets a parameter or a recipe field; empty if it cannot."""
    if name in flags or "overrides" not in flags:
        return flags.get(name, "")
    from irc.recipe.recipe import recipe_fields

    return f"--set {name}=..." if name in [field for field, _, _ in recipe_fields()] else ""


def _one_line(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 2] + " …"


def _end_cleanly() -> None:
    """Make SIGTERM and SIGHUP unwind the stack as an interrupt does, so that no half-written folder remains."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


def _escape_unknown_letters() -> None:
    """Show letters that stdout's encoding lacks (ascii, cp1252) as escapes, as Python does on stderr.

    The rest stays in the encoding that the reader of stdout expects, and the escapes say which letters were meant.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _quiet_libraries() -> None:
    """Silence other libraries, and send our own log to stderr, above any progress bar."""
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
