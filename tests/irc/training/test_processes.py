"""What the environment says about other processes counts only where it describes a group of them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, PartialState

from irc.cli import main
from irc.compare.run import compare
from irc.errors import InputError
from irc.training.loop import accelerator_for
from irc.training.processes import Group, group, is_main_process, join_group
from tests.irc.forked import Forked

FULL = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def set_group(monkeypatch: pytest.MonkeyPatch, **variables: str | None) -> None:
    for name in FULL:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        if value is not None:
            monkeypatch.setenv(name, value)


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Forget what accelerate found out about this process, and remember it again afterwards."""
    states = [PartialState._shared_state, AcceleratorState._shared_state]
    kept = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "3"},
        {"RANK": ""},
        {"RANK": "three", "LOCAL_RANK": "x"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    ],
)
def test_a_rank_without_a_group_does_not_count(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    set_group(monkeypatch, **variables)
    assert group() == Group()
    assert is_main_process()
    joined = join_group("cpu")
    assert (joined.num_processes, joined.process_index) == (1, 0)
    assert {name: os.environ[name] for name in variables} == variables  # left as it was


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_TORCH_DEVICE": "cuda:7"},
        {"ACCELERATE_USE_CPU": "maybe"},
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x", "ACCELERATE_DEBUG_MODE": "perhaps"},
    ],
    ids=str,
)
def test_settings_of_accelerate_do_not_count_either(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    set_group(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with fresh_accelerate():
        made = accelerator_for("cpu", "fp32")
        assert (made.device.type, made.num_processes, made.gradient_accumulation_steps) == ("cpu", 1, 1)
    assert {name: os.environ[name] for name in variables} == variables


def test_a_group_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    set_group(monkeypatch, **FULL)
    assert group() == Group(2, 1, 1, "localhost:29500")
    assert not is_main_process()


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        ("WORLD_SIZE", "two"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "-1"),
        ("RANK", "1" * 5000),
        ("RANK", "2"),
        ("RANK", "-1"),
        ("RANK", "1.0"),
        ("RANK", ""),
        ("RANK", None),
        ("LOCAL_RANK", None),
        ("LOCAL_RANK", "9"),
        ("MASTER_ADDR", None),
        ("MASTER_PORT", None),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "70000"),
    ],
)
def test_a_bad_value_is_named(monkeypatch: pytest.MonkeyPatch, changed: str, value: str | None) -> None:
    set_group(monkeypatch, **{**FULL, changed: value})
    with pytest.raises(InputError, match=changed) as refused:
        group()
    assert (value or "")[:40] in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_comparison_is_no_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_group(monkeypatch, **FULL)
    plan: Any = None
    with pytest.raises(InputError, match="WORLD_SIZE is 2"):
        compare(plan, plan, tmp_path, plan)


def test_a_stray_rank_writes_the_bundle(
    irc_main: Any, convert_arguments: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_group(monkeypatch, RANK="3")
    done = irc_main(*convert_arguments(tmp_path / "b"))
    assert done.code == 0, done.err
    assert done.json["output"] == str(tmp_path / "b")
    assert (tmp_path / "b" / "irc_config.json").is_file()


def join_soon(seconds: float) -> int:
    """Join a group with little patience, as the command line would."""
    from irc.training import processes

    processes._JOIN_SECONDS = seconds
    try:
        join_group("cpu")
    except Exception as error:
        sys.stdout.write(f"{type(error).__name__} {error}")
        return 1
    return 0


def missing_peer() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return {**FULL, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": str(free.getsockname()[1])}


def test_waiting_for_a_missing_peer_ends(tmp_path: Path) -> None:
    variables = missing_peer()
    waiting = Forked(join_soon, 2.0, folder=tmp_path, environment=variables)
    said, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 1
    assert said.startswith("IrcError the 2 processes")
    assert f"localhost:{variables['MASTER_PORT']}" in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_waiting(convert_arguments: Any, tmp_path: Path, number: int, code: int) -> None:
    variables = missing_peer()
    arguments = [str(each) for each in convert_arguments(tmp_path / "b")]
    waiting = Forked(main, arguments, folder=tmp_path / "said", environment=variables)
    told, deadline = "", time.monotonic() + 60
    while "waits for the others" not in told and time.monotonic() < deadline:
        time.sleep(0.1)
        path = tmp_path / "said" / "stderr"
        told = path.read_text() if path.exists() else ""
    assert f"process 0 of 2 waits for the others at localhost:{variables['MASTER_PORT']}" in told
    waiting.send_signal(number)
    waiting.communicate(timeout=20)
    assert waiting.returncode == code
    assert not (tmp_path / "b").exists()
