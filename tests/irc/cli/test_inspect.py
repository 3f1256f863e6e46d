"""`irc inspect` as a user sees it: the overview, graphs and reasons, JSON, narrow terminals, and errors."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from irc import console
from irc.bundle import loading
from irc.bundle.saving import save_bundle
from irc.bundle.source import ModelSource
from irc.cli import main
from irc.cli.inspect import _short
from irc.console import output
from irc.model.build import build_routed
from irc.model.checkpoint import BaseModel
from irc.model.routed import RoutingSpec

KEYS = (
    "model base architecture policy forecaster layers seq_len parameters target sparsity fidelity flops "
    "flops_ratio units refusals"
)
UNIT_KEYS = "name kind layer hidden rank router_hidden keep_ratio recoverability flops parameters"
INSERTED = ("forecaster", "router", "mux")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_of: Callable[..., Any]) -> dict[str, str]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    root = tmp_path_factory.mktemp("models")
    tiny_of(config).eager.save_pretrained(root / "plain")
    model = build_routed(BaseModel(str(root / "plain"), root / "plain"), RoutingSpec(3))
    units = {unit.name: {"keep_ratio": 0.75, "recoverability": 0.5} for unit in model.units}
    sparsity = {"target": 0.3, "realized": 0.25, "attention": 0.25, "ffn": 0.25}
    data = {"name": "text", "fingerprint": "0", "seq_len": 16}
    save_bundle(model, root / "bundle", {"units": units, "sparsity": sparsity, "data": data})
    return {"plain": str(root / "plain"), "bundle": str(root / "bundle")}


@pytest.fixture(autouse=True)
def _open_each_model_once(monkeypatch: pytest.MonkeyPatch, opened: dict[str, Any]) -> None:
    real = loading.open_model

    def once(source: ModelSource) -> Any:
        if source.name not in opened:
            opened[source.name] = real(source)
        return opened[source.name]

    monkeypatch.setattr(loading, "open_model", once)


@pytest.fixture(scope="module")
def opened() -> dict[str, Any]:
    return {}


@pytest.fixture(autouse=True)
def _restore_process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "120")
    output._console.cache_clear()
    with warnings.catch_warnings():
        yield
    console.set_json_mode(False)
    output._console.cache_clear()
    for name in ("irc", "exporters", "passes"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [], True
        log.setLevel(logging.NOTSET)


def test_overview_shows_units_insertions_and_totals(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", folders["bundle"]]) == 0
    shown = capsys.readouterr().out
    assert "layers 0 to 1, identical" in shown
    assert "+ forecaster 32-3-32 linear  227 parameters" in shown
    assert "+ router 32-8-2  282 parameters" in shown
    rows = [line.split() for line in shown.splitlines() if re.match(r"\d\.(self_attn|mlp) ", line)]
    assert [row[0] for row in rows] == ["0.self_attn", "0.mlp", "1.self_attn", "1.mlp"]
    assert {(row[1], row[3]) for row in rows} == {("0.750", "0.500")}
    assert re.search(r"sparsity, nominal +0\.250  \(target 0\.300\)", shown)
    assert re.search(r"inserted parameters +2,036  \(\d+\.\d\d% of the base\)", shown)


def test_a_plain_model_shows_no_insertions(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", folders["plain"]]) == 0
    shown = capsys.readouterr().out
    assert "0.self_attn" in shown
    assert "base parameters" in shown
    assert not [word for word in (*INSERTED, "keep", "inserted", "sparsity", "routed") if word in shown]


@pytest.mark.parametrize("model", ["bundle", "plain"])
def test_the_overview_fits_sixty_columns_without_colours(
    model: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["inspect", folders[model]]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    named = folders[model]
    lines = [line.rstrip() for line in shown.splitlines() if named[:20] not in line and line not in named]
    assert max(map(len, lines)) <= 60
    assert sum(line.startswith(("0.", "1.")) for line in lines) == 4  # no row was folded


def test_json_is_one_object_with_all_keys(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", folders["bundle"], "--json"]) == 0
    shown = capsys.readouterr()
    facts = json.loads(shown.out)
    assert set(facts) == set(KEYS.split())
    assert all(set(unit) == set(UNIT_KEYS.split()) for unit in facts["units"])
    assert facts["model"] == folders["bundle"]
    assert facts["base"] == folders["plain"]
    assert facts["units"][3]["flops"].keys() == {"dense", "routed"}


def test_json_carries_the_texts_asked_for(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", folders["bundle"], "--json", "--graph", "1", "--diff", "--why", "0.mlp"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {*KEYS.split(), "graph", "diff", "why"}
    assert facts["graph"].startswith("# model.layers.1\n")
    assert "\n+%mlp_mux = call mlp_mux(" in facts["diff"]
    assert facts["why"].startswith("model.layers.0.mlp: ")
    assert "ffn" in facts["why"]


def test_graph_and_diff_are_shown_alone(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", folders["bundle"], "--graph", "0"]) == 0
    graph = capsys.readouterr().out
    assert graph.splitlines()[0] == "# model.layers.0"
    assert "layers 0 to 1" not in graph
    assert main(["inspect", folders["bundle"], "--diff"]) == 0
    diff = capsys.readouterr().out.splitlines()
    assert diff[:2] == ["--- before", "+++ after"]
    signs = [line[0] for line in diff[2:]]
    assert (signs.count("+"), signs.count("-")) == (8, 2)


def test_diff_of_a_plain_model_says_that_there_is_none(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", folders["plain"], "--diff"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1


def test_why_is_one_line(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", folders["plain"], "--why", "1.self_attn"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("model.layers.1.self_attn: ")
    assert "attention" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--graph", "2"], "layer 2"),
        (["--graph", "-1", "--diff"], "layer -1"),
        (["--why", "7.mlp"], "7.mlp"),
        (["--why", "7.mlp"], "model.layers.0.self_attn, "),
        (["--graph", "one"], "'one'"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], said: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", folders["bundle"], *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "said"),
    [(None, "-"), (0, "0"), (999, "999"), (999.6, "1.00k"), (13_081, "13.1k"), (524_288, "524k"), (83.9e9, "83.9G")],
)
def test_counts_have_three_digits(number: float | None, said: str) -> None:
    assert _short(number) == said


def test_shades_run_from_red_to_green() -> None:
    red, green = console.shade(0), console.shade(1)
    assert red == "rgb(205,70,60)"
    assert green == "rgb(60,160,60)"
    assert console.shade(2) == green
    assert len({console.shade(index / 8) for index in range(9)}) == 9
