"""The command line as a process sees it: help, exit codes, error messages, and what goes to which stream."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from irc import console
from irc.cli import group, main, options
from irc.cli.recipe_options import recipe_of, set_option
from irc.errors import GateMissed, InputError, Interrupted, IrcError
from irc.progress import place, resumable
from irc.recipe.policies import POLICIES
from irc.recipe.presets import ready_names
from irc.recipe.stages import STAGE_NAMES

START = "import sys; from irc.cli import main; code = main(sys.argv[1:]); "
HELP_SECONDS = 0.6  # the promise is 0.3 s on an idle machine; torch alone takes over 1 s, transformers more
HEAVY = ("torch", "transformers", "peft", "onnxruntime", "numpy", "pydantic", "yaml")


@pytest.fixture(autouse=True)
def _restore_process_state() -> Iterator[None]:
    with warnings.catch_warnings():
        yield
    console.set_json_mode(False)
    for name in ("irc", "exporters", "passes"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [], True
        log.setLevel(logging.NOTSET)


def replace_commands(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
    """Replace every command by one that fails with `error`, or shows one result of each kind."""

    @click.command()
    @options.common_options
    def command(as_json: bool) -> None:
        if error is not None:
            raise error
        console.say("a line")
        console.table("a table", ["n"], [[1]])
        if as_json:
            console.emit_json({"n": 1})

    monkeypatch.setattr(group.LazyGroup, "get_command", lambda self, ctx, name: command)


def run(*arguments: str, after: str = "sys.exit(code)") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START + after, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def fastest(*arguments: str) -> float:
    """Return the least of several wall times, so that a busy machine disturbs little."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert run(*arguments).returncode == 0
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("arguments", [("--help",), *((name, "--help") for name in group.COMMANDS)], ids=" ".join)
def test_help_is_immediate(arguments: tuple[str, ...]) -> None:
    assert fastest(*arguments) < HELP_SECONDS


def test_without_a_text_a_model_reads_its_own_and_source_code(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: some/llama\nrank: 8\n")
    assert recipe_of(None, [], {"model": "some/llama"}).data == ["self", "stdlib"]
    assert recipe_of(None, ["model=some/llama"], {}).data == ["self", "stdlib"]
    assert recipe_of(None, ["data=a.txt"], {"model": "some/llama"}).data == ["a.txt"]
    assert recipe_of(None, [], {"model": "some/llama", "data": ["b.txt"]}).data == ["b.txt"]
    assert recipe_of(None, [], {"model": "demo"}).data == recipe_of(None, [], {}).data == ["stdlib"]
    assert recipe_of(tmp_path / "mine.yaml", [], {}).data == ["stdlib"], "recipes keep their meaning"
    weighted = recipe_of(None, [], {"model": "some/llama", "data_weights": [2.0, 1.0]})
    assert (weighted.data, weighted.data_weights) == (["self", "stdlib"], [2.0, 1.0])
    with pytest.raises(InputError, match="for 2 texts"):
        recipe_of(None, [], {"model": "some/llama", "data_weights": [1.0]})


@pytest.mark.parametrize("arguments", [("--help",), *((name, "--help") for name in group.COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = run(*arguments, after=f"print('loaded', [name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout.startswith("Usage: irc ")
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_group_help_imports_no_command_and_lists_each_in_one_line() -> None:
    done = run("--help", after="print('loaded', [name for name in sys.modules if name == 'irc.cli.env'])")
    assert done.stdout.splitlines()[-1] == "loaded []"
    width = max(map(len, group.COMMANDS))
    for name, summary in group.COMMANDS.items():
        assert f"  {name:<{width}}  {summary}" in done.stdout.splitlines()


def test_every_command_has_a_file_and_every_file_a_command() -> None:
    files = Path(group.__file__).parent.glob("*.py")
    assert {path.stem for path in files if "\ndef command(" in path.read_text()} == set(group.COMMANDS)


@pytest.mark.parametrize("name", group.COMMANDS)
def test_every_command_takes_json_and_debug(name: str) -> None:
    command = group.group.get_command(click.Context(group.group), name)
    assert command is not None
    assert {"--json", "--debug"} <= {flag for parameter in command.params for flag in parameter.opts}


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["irc"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("Usage: irc ")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (IrcError("the pass failed; do this"), 1, "the pass failed; do this"),
        (InputError("no [such] file; give another"), 2, "no [such] file; give another"),
        (InputError("no room", options=("as_json", "overrides")), 2, "no room (--json)"),
        (GateMissed("0.2 is less than 0.3"), 3, "0.2 is less than 0.3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("two\n  lines"), 1, "RuntimeError: two lines (--debug shows the traceback)"),
        (ZeroDivisionError(), 1, "ZeroDivisionError: no message (--debug shows the traceback)"),
        (click.UsageError("Wrong use."), 2, "Wrong use (see 'irc --help')"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["plain", "json"])
def test_a_failure_is_one_line_and_its_exit_code(
    error: BaseException,
    code: int,
    sentence: str,
    flags: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace_commands(monkeypatch, error)
    assert main(["env", *flags]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.strip().replace("(see 'irc env --help')", "(see 'irc --help')") == f"error: {sentence}"


def test_an_interrupt_says_where_and_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    @click.option("--resume", is_flag=True)
    @click.option("--force", is_flag=True)
    @click.argument("model")
    def command(**flags: Any) -> None:
        with console.progress("cells", 3) as cells, place("cell b"), resumable(), place("stage router"):
            cells.update(1)
            with console.progress("teach", 40) as steps:
                steps.update(12)
                raise KeyboardInterrupt

    monkeypatch.setattr(group.LazyGroup, "get_command", lambda self, ctx, name: command)
    for flags in ([], ["--resume"], ["--force"]):
        assert main(["env", "my model", *flags]) == 130
        told = capsys.readouterr().err.strip()
        assert "in cells 1/3, cell b, stage router, teach 12/40;" in told
        assert told.endswith("irc env 'my model' --resume")


def test_only_work_that_can_be_resumed_is_offered() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, place("a"), place("b"):
        raise KeyboardInterrupt
    assert caught.value.__notes__ == ["b", "a"]
    assert not isinstance(caught.value, Interrupted)
    with pytest.raises(Interrupted), resumable(), resumable():
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("encoding", "errors", "shown"),
    [
        ("ascii", "strict", b"caf\\xe9 \\u4f60"),
        ("ascii", "surrogateescape", b"caf\\xe9 \\u4f60"),
        ("cp1252", "strict", b"caf\xe9 \\u4f60"),
        ("ascii", "replace", b"caf? ?"),
        ("utf-8", "strict", "caf\u00e9 \u4f60".encode()),
    ],
)
def test_letters_that_stdout_lacks_are_escaped(
    monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, shown: bytes
) -> None:
    @click.command()
    def command() -> None:
        console.say("caf\u00e9 \u4f60")
        console.stream("caf\u00e9 \u4f60\n")
        console.table("", ["caf\u00e9 \u4f60"], [[1]])
        console.tree("caf\u00e9 \u4f60", {"a": {"b": 1}})

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors=errors))
    monkeypatch.setattr(group.LazyGroup, "get_command", lambda self, ctx, name: command)
    assert main(["env"]) == 0
    lines = [line for line in written.getvalue().splitlines() if line.startswith(b"caf")]
    assert [line.rstrip() for line in lines] == [shown] * 4


@pytest.mark.parametrize("arguments", [["--debug", "env"], ["env", "--debug"]], ids=" ".join)
def test_debug_shows_the_traceback_then_the_message(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_commands(monkeypatch, IrcError("the sentence"))
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("Traceback (most recent call last)")
    assert shown.err.endswith("\nerror: the sentence\n")


def test_json_leaves_one_object_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace_commands(monkeypatch)
    assert main(["env", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"n": 1}
    assert "a line" in shown.err
    assert "a table" in shown.err


def test_json_mode_does_not_outlive_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace_commands(monkeypatch)
    main(["env", "--json"])
    capsys.readouterr()
    main(["env"])
    assert "a line" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "suggested"), [("evl", "'eval'"), ("inspct", "'inspect'"), ("convertt", "'convert'"), ("xyzzy", None)]
)
def test_an_unknown_command_suggests_the_nearest(
    given: str, suggested: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert f"'{given}'" in error
    assert (suggested or ", ".join(group.COMMANDS)) in error


def test_a_wrong_option_names_the_commands_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--bogus"]) == 2
    error = capsys.readouterr().err
    assert "--bogus" in error
    assert "irc env --help" in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dtype", "bf16", "--device", "cuda:1"], ("bfloat16", "cuda:1", 512)),
        (["--seq-len", "64"], ("auto", "auto", 64)),
        (["--device", "gpu"], None),
        (["--dtype", "int8"], None),
        (["--seq-len", "1"], None),
        (["--seed", "-1"], None),
    ],
)
def test_shared_options_check_their_values(arguments: list[str], expected: tuple[str, str, int] | None) -> None:
    @click.command()
    @options.device_option()
    @options.dtype_option()
    @options.seq_len_option()
    @options.seed_option()
    def command(device: str, dtype: str, seq_len: int, seed: int) -> tuple[str, str, int]:
        return dtype, device, seq_len

    if expected is None:
        with pytest.raises(click.UsageError):
            command.main(arguments, standalone_mode=False)
    else:
        assert command.main(arguments, standalone_mode=False) == expected


def test_warnings_and_logs_of_the_library_reach_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def command() -> None:
        logging.getLogger("irc.stages").info("a remark")
        logging.getLogger("passes.match").warning("a doubt")
        logging.getLogger("irc.stages").debug("a detail")

    monkeypatch.setattr(group.LazyGroup, "get_command", lambda self, ctx, name: command)
    main(["env"])
    assert capsys.readouterr().err == "a remark\nwarning: a doubt\n"


def test_a_closed_pipe_ends_quietly() -> None:
    command = f'"{sys.executable}" -c "{START}sys.exit(code)" --help | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "1")


def with_closed(stream: str, arguments: str) -> subprocess.CompletedProcess[str]:
    command = f'"{sys.executable}" -c "{START}sys.exit(code)" {arguments} {stream}>&-'
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("arguments", ["env --json", "--help", "inspect nowhere"])
def test_a_closed_stdout_is_one_line(arguments: str) -> None:
    done = with_closed("1", arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: stdout is closed")
    assert done.stderr.count("\n") == 1


def test_a_closed_stderr_costs_no_result() -> None:
    done = with_closed("2", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: irc ")


def test_the_help_of_convert_names_every_policy_and_stage() -> None:
    command = group.group.get_command(click.Context(group.group), "convert")
    assert command is not None
    texts = {each.name: each.help or "" for each in command.params if isinstance(each, click.Option)}
    assert ", ".join(STAGE_NAMES) in texts["stages"]
    assert ", ".join(list(POLICIES)[:-1]) in texts["policy"]
    assert all(name in texts["recipe_file"] for name in {name.rpartition("-")[0] for name in ready_names()})


def test_fields_of_a_recipe_as_json(irc_main: Any) -> None:
    for arguments in (("--fields", "--json"), ("--json", "--fields")):
        fields = irc_main("convert", *arguments).json["fields"]
        (steps,) = (each for each in fields if each["field"] == "router.steps")
        assert isinstance(steps["default"], int)
        assert steps["help"]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (("seq_len",), " (--seq-len)"),
        (("output", "force"), " (--output)"),
        (("router.steps",), " (--set router.steps=...)"),
        ((), ""),
    ],
)
def test_an_error_names_the_options_that_help(
    given: tuple[str, ...], shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    @options.output_option("A folder.")
    @options.seq_len_option()
    @set_option()
    def command(**flags: Any) -> None:
        raise InputError("it does not fit", options=given)

    monkeypatch.setattr(group.LazyGroup, "get_command", lambda self, ctx, name: command)
    assert main(["env"]) == 2
    assert capsys.readouterr().err == f"error: it does not fit{shown}\n"


def test_errors_of_a_recipe_name_where_the_value_was_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rank: 3\nrouter: {reads: bottleneck}\n")
    assert recipe_of(path, ["rank=4"], {"rank": 5}).rank == 5
    for settings, flags, source in (
        (["rank=-4"], {}, "--set: "),
        ([], {"rank": -5}, "--rank: "),
        ([], {"seq_len": 1}, "--seq-len: "),
        ([], {"policy": "skipgpt"}, "--policy: "),
        (["policy=skipgpt"], {"seed": 1}, "--set: "),
        (["dial=[0.1]"], {"policy": "static"}, "--policy: "),
        (["router.clip=1"], {"seed": 1}, "--set: "),
    ):
        with pytest.raises(InputError) as refused:
            recipe_of(path, settings, flags)
        assert str(refused.value).startswith(source)
    path.write_text("rank: -3\n")
    with pytest.raises(InputError) as refused:
        recipe_of(path, [], {"rank": 5})
    assert str(refused.value).startswith(f"recipe {path}: ")


def test_a_path_longer_than_any_is_wrong_input(irc_main: Any) -> None:
    assert irc_main("eval", 300 * "a").code == 2


def test_a_tilde_in_an_output_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave it in `--output=~/b`, and a folder that is named ~ is easily removed as rm -r ~."""
    monkeypatch.setenv("HOME", "/home/ada")
    given = []

    @click.command()
    @options.output_option("A folder.")
    def command(output: Path | None) -> None:
        given.append(output)

    for arguments in (["--output=~/b"], ["-o", "~"], ["-o", "a~/b"], []):
        command.main(arguments, standalone_mode=False)
    assert given == [Path("/home/ada/b"), Path("/home/ada"), Path("a~/b"), None]
