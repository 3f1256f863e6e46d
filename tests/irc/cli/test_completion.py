"""Shell completion, by click's own mechanism: commands, options and values, in bash, zsh and fish, and at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from irc.cli import group

ROOT = Path(__file__).parents[3]
SECONDS = 1.0  # a third of it on an idle machine; torch alone takes over 1 s
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Give `run(command, **environment)`: a command with `irc` on its path."""
    folder = tmp_path_factory.mktemp("bin")
    start = "import sys; from irc.cli import main; sys.exit(main())"
    (folder / "irc").write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{start}" "$@"\n')
    (folder / "irc").chmod(0o755)
    (folder / "bundle-a").mkdir()

    def start_command(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        found = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        found |= environment
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=found, cwd=folder)

    return start_command


def completed(run: Run, line: str, shell: str = "zsh") -> list[str]:
    """Return what click tells a shell to offer for the last word of a line."""
    place = {"COMP_WORDS": line, "COMP_CWORD": line.split(" ")[-1] if shell == "fish" else str(line.count(" "))}
    done = run(["irc"], _IRC_COMPLETE=f"{shell}_complete", **place)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    if shell == "zsh":  # type, value and help on a line each
        return rows[1::3]
    return [row.split(",", 1)[1].split("\t")[0] for row in rows]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_are_listed(run: Run, shell: str) -> None:
    assert completed(run, "irc ", shell) == list(group.COMMANDS)
    assert completed(run, "irc ex", shell) == ["export"]


@pytest.mark.parametrize("name", group.COMMANDS)
def test_options_of_a_command_are_listed_at_once(run: Run, name: str) -> None:
    command = group.group.get_command(click.Context(group.group), name)
    assert command is not None
    flags = [flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
    long = {flag for flag in flags if flag.startswith("--")}
    seconds = []
    for _ in range(3):  # the least, so that a busy machine disturbs little
        start = time.perf_counter()
        assert set(completed(run, f"irc {name} --")) == long | {"--help"}
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < SECONDS


def test_values_are_listed(run: Run) -> None:
    assert completed(run, "irc verify onnx --provider c") == ["cpu", "cuda"]
    assert completed(run, "irc convert demo --forecaster ") == ["linear", "silu"]


def test_completion_after_a_value_that_torch_would_read_is_at_once(run: Run) -> None:
    done = run(
        [sys.executable, "-X", "importtime", "-c", "from irc.cli import main; main()"],
        _IRC_COMPLETE="zsh_complete",
        COMP_WORDS="irc bench --sparsities 0.25 --pref",
        COMP_CWORD="4",
    )
    assert "--prefill" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.endswith(("| torch", "| numpy", "| transformers"))]


@pytest.mark.parametrize(("line", "expected"), [("irc con", "convert"), ("irc inspect --ht", "--html")])
def test_bash_completes(run: Run, line: str, expected: str) -> None:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    words = line.split()
    script = f"""
        eval "$(_IRC_COMPLETE=bash_source irc)"
        compopt() {{ :; }}
        COMP_WORDS=({line}) COMP_CWORD={len(words) - 1}
        function=$(complete -p irc | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        $function irc
        echo "${{COMPREPLY[@]}}"
    """
    done = run(["bash", "-c", script])
    assert done.stdout.split() == [expected], done.stderr


def test_fish_completes(run: Run) -> None:
    if shutil.which("fish") is None:
        pytest.skip("there is no fish")
    script = "_IRC_COMPLETE=fish_source irc | source; complete -C 'irc con'; complete -C 'irc inspect bund'"
    done = run(["fish", "--no-config", "-c", script])
    assert [row.split("\t")[0] for row in done.stdout.splitlines()] == ["convert", "bundle-a/"], done.stderr


def test_zsh_loads_the_script(run: Run) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("there is no zsh")
    script = 'autoload -U compinit; compinit -u -D; eval "$(_IRC_COMPLETE=zsh_source irc)"; print $_comps[irc]'
    done = run(["zsh", "-f", "-c", script])
    assert done.stdout.strip() == "_irc_completion", done.stderr
