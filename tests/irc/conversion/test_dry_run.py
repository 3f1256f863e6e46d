"""A dry run estimates what a conversion takes, and writes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from irc.conversion import dry_run
from irc.model import own_text
from tests.irc.conftest import CONFIG, SEQ_LEN

Arguments = Callable[..., list[str]]


def test_a_dry_run_plans_every_stage_and_writes_nothing(
    irc_main: Callable[..., Any], convert_arguments: Arguments, tmp_path: Path
) -> None:
    before = set(tmp_path.iterdir())
    arguments = [*convert_arguments(tmp_path / "b"), "--stages", "lff,router,lora", "--dry-run"]
    shown = irc_main(*arguments)
    assert shown.code == 0, shown.err
    plan = shown.json
    assert [phase["name"] for phase in plan["phases"]] == ["text", "capture", "lff", "router", "lora", "evaluate"]
    assert plan["seconds"] == pytest.approx(sum(phase["seconds"] for phase in plan["phases"]), abs=0.5)
    assert plan["recipe"]["router"]["steps"] == 6  # as it was asked for, not as it was tried
    assert plan["memory"]["fits"]
    assert 100 < plan["memory"]["needed_mib"] < plan["memory"]["free_mib"]
    assert plan["disk"]["fits"]
    assert set(tmp_path.iterdir()) == before
    table = irc_main(*(word for word in arguments if word != "--json")).out
    assert f"{plan['phases'][0]['name']}" in table
    assert "needed" in table


def test_own_text_takes_as_long_as_its_tokens_in_the_middle_of_a_document(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    now = 0.0

    class Sampler:
        length = 40

        def __init__(self, *_: Any) -> None: ...

        def prompts(self) -> list[list[int]]:
            return [[1, 2, 3]] * own_text._BATCH

        def continued(self, rows: list[list[int]], length: int, clock: Any = None) -> None:
            nonlocal now
            calls.append((len(rows[0]), length))
            for _ in range(length):
                now += 2.0 if len(rows[0]) == 3 else 5.0
                if clock:
                    clock(torch.tensor([[1]]), None)

    monkeypatch.setattr(own_text, "_Sampler", Sampler)
    monkeypatch.setattr(own_text.time, "monotonic", lambda: now)
    tokens = 3 * own_text._BATCH * (3 + 40)  # three batches of documents
    assert own_text.sampling_seconds(base, tokens, 0, "cpu") == 3 * (2.0 + 39 * 5.0)
    assert calls == [(3, 1), (3, 1), (23, 9)]


def test_own_text_is_not_sampled_but_its_time_counts(
    irc_main: Callable[..., Any], convert_arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    arguments = [*convert_arguments(tmp_path / "b", self_tokens=1500), "--data", "self"]
    plan = irc_main(*arguments, "--dry-run").json
    assert plan["phases"][0]["name"] == "own text"
    assert plan["phases"][0]["seconds"] > 0
    assert plan["recipe"]["data"][1] == "self"
    assert not (tmp_path / "hf").exists()
    assert irc_main(*arguments).code == 0
    assert "own text" not in [phase["name"] for phase in irc_main(*arguments, "--dry-run").json["phases"]]


def test_the_time_of_the_dial_counts(
    irc_main: Callable[..., Any], convert_arguments: Arguments, tmp_path: Path
) -> None:
    arguments = [*convert_arguments(tmp_path / "b"), "--dry-run", "--dial", "0.1,0.2,0.3"]
    phases = {phase["name"]: phase["seconds"] for phase in irc_main(*arguments).json["phases"]}
    assert list(phases) == ["text", "capture", "lff", "router", "dial", "evaluate"]
    assert phases["dial"] > 0


def test_time_grows_with_the_steps_that_are_asked_for(
    irc_main: Callable[..., Any], convert_arguments: Arguments, tmp_path: Path
) -> None:
    def seconds(steps: int) -> float:
        more = ["--set", f"router.steps={steps}", "--dry-run"]
        phases = irc_main(*convert_arguments(tmp_path / "b"), *more).json["phases"]
        return float(next(phase["seconds"] for phase in phases if phase["name"] == "router"))

    assert seconds(200_000) > 100 * seconds(200)


def test_time_does_not_grow_with_teaching_that_is_not_done(
    irc_main: Callable[..., Any], convert_arguments: Arguments, tmp_path: Path
) -> None:
    def seconds(steps: int) -> float:
        more = ["--set", f"router.teach_steps={steps}", "--set", "router.steps=1", "--dry-run"]
        phases = irc_main(*convert_arguments(tmp_path / "b"), *more).json["phases"]
        return float(next(phase["seconds"] for phase in phases if phase["name"] == "router"))

    assert seconds(1_000_000) < 20 * seconds(256)  # 256 batches are 16,384 tokens


def test_what_does_not_fit_is_said(
    irc_main: Callable[..., Any],
    convert_arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dry_run, "_free_memory", lambda device: 1.0)
    arguments = (word for word in convert_arguments(tmp_path / "b") if word != "--json")
    shown = irc_main(*arguments, "--dry-run")
    assert shown.code == 0
    assert re.search(r"memory .*\bno\b", shown.out)
    assert "activation_checkpointing=true" in shown.out


def test_memory_that_runs_out_is_an_error_of_one_sentence(
    irc_main: Callable[..., Any],
    convert_arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def starves(context: Any) -> Any:
        raise MemoryError

    monkeypatch.setitem(dry_run.STAGE_RUNNERS, "router", starves)
    shown = irc_main(*convert_arguments(tmp_path / "b"), "--dry-run")
    assert shown.code == 1
    assert "router.batch_size" in shown.sentence()
    assert "--seq-len" in shown.sentence()
    assert "Traceback" not in shown.err


def test_pytorch_s_own_allocator_that_runs_out_is_told_alike(
    irc_main: Callable[..., Any],
    convert_arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def starves(context: Any) -> Any:
        torch.empty(1 << 60, dtype=torch.uint8)

    def fails(context: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setitem(dry_run.STAGE_RUNNERS, "router", starves)
    for more in (["--dry-run"], []):
        shown = irc_main(*convert_arguments(tmp_path / "b"), *more)
        assert (shown.code, "router.batch_size" in shown.sentence()) == (1, True)
    assert (tmp_path / "b.partial/lff.json").is_file(), "the work is kept"
    monkeypatch.setitem(dry_run.STAGE_RUNNERS, "router", fails)
    assert "RuntimeError: something else" in irc_main(*convert_arguments(tmp_path / "c"), "--dry-run").err


@pytest.mark.parametrize("stage", ["router", "lora"])
def test_a_batch_beyond_hope_is_not_tried(
    irc_main: Callable[..., Any], convert_arguments: Arguments, tmp_path: Path, stage: str
) -> None:
    huge = ["--set", f"{stage}.batch_size={2**50}", "--stages", "lff,router,lora", "--dry-run"]
    shown = irc_main(*convert_arguments(tmp_path / "b"), *huge)
    assert shown.code == 1
    assert f"{stage}.batch_size {2**50}" in shown.sentence()


@pytest.mark.parametrize(("steps", "tokens"), [(60, 3_840), (300, 16_384)])
def test_what_teaching_keeps_counts(
    irc_main: Callable[..., Any],
    convert_arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    tokens: int,
) -> None:
    """Two bytes for every number that a router reads of a token, of 16,384 tokens at most."""
    monkeypatch.setattr(dry_run, "_peak_memory", lambda device: 0.0)
    settings = [flag for name in (f"router.teach_steps={steps}", "lff.tokens=64") for flag in ("--set", name)]
    plan = irc_main(*convert_arguments(tmp_path / "b"), *settings, "--dry-run").json
    tried = 2 * 4 * SEQ_LEN
    kept = (tokens - tried) * 2 * CONFIG["num_hidden_layers"] * CONFIG["hidden_size"] * 2
    assert plan["memory"]["needed_mib"] == pytest.approx(kept / 2**20, abs=0.5)
