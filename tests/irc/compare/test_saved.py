"""Damaged files of a comparison: each is refused with exit code 2 and one line that names the file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from irc.compare.saved import read_figures
from irc.errors import InputError

Main = Callable[..., Any]
PLAN = "--policies static --sparsities 0.5 --seeds 1".split()
CELL = "static-0.5-seed0"


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def made(
    irc_main: Main,
    arguments: Callable[..., list[str]],
    kept: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished comparison of one cell, to be damaged."""
    if not kept:
        folder = tmp_path_factory.mktemp("made") / "c"
        outcome = irc_main(*arguments(folder, *PLAN))
        assert outcome.code == 0, outcome.err
        kept["made"] = folder
    return Path(shutil.copytree(kept["made"], tmp_path / "c"))


MANIFESTS = ([], "x", {"recipe": []}, {"recipe": None}, {"data": "x"}, {"data": {"name": "x"}}, {"data": []})


@pytest.mark.parametrize("change", MANIFESTS, ids=str)
def test_a_manifest_of_other_types(
    irc_main: Main, arguments: Callable[..., list[str]], made: Path, change: Any
) -> None:
    path = made / "compare.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change if isinstance(change, dict) else change))
    outcome = irc_main(*arguments(made, *PLAN, "--resume"))
    assert outcome.code == 2
    assert outcome.sentence().startswith(f"{path}: damaged")
    assert "--force" in outcome.sentence()


def test_a_setting_that_differs_is_named_as_it_is_set(
    irc_main: Main, arguments: Callable[..., list[str]], made: Path
) -> None:
    outcome = irc_main(*arguments(made, *PLAN, "--resume", "--set", "router.steps=9"))
    assert outcome.code == 2
    assert re.search(r"router\.steps = \d+.* 9\b", outcome.sentence())


@pytest.mark.parametrize("content", ["[]", "{}", '{"perplexity": 1}', "{", "[" * 100_000])
def test_figures_that_are_damaged(
    irc_main: Main, arguments: Callable[..., list[str]], made: Path, content: str
) -> None:
    path = made / "cells" / CELL / "metrics.json"
    path.write_text(content)
    outcome = irc_main(*arguments(made, *PLAN, "--resume"))
    assert outcome.code == 2
    assert outcome.sentence().startswith(f"{path}: damaged (")
    assert f"delete {path.parent}" in outcome.sentence()
    assert "--resume" in outcome.sentence()
    shutil.rmtree(path.parent)  # as it says
    assert irc_main(*arguments(made, *PLAN, "--resume")).code == 0


def good() -> dict[str, Any]:
    return {
        "data": {"tokens": 4},
        "perplexity": {"dense": 2.0, "routed": 3.0, "ratio": 1.5},
        "sparsity": {"target": None, "realized": 0.25, "attention": 0, "ffn": 0.5},
        "flops_ratio": 0.8,
        "units": {"model.layers.0.mlp": {"keep_ratio": 0.5, "recoverability": float("nan")}},
        "seconds": {"capture": 1.0},
        "stages": {"router": {"seconds": 1.0, "cpu_seconds": 2.0}},
    }


def test_good_figures_are_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(good()))
    found = read_figures(tmp_path / "metrics.json", ["router"])
    assert found["tokens"] == 4
    assert found["perplexity"] == good()["perplexity"]
    with pytest.raises(InputError, match=r"damaged \(stages\.lff is missing\)"):
        read_figures(tmp_path / "metrics.json", ["lff", "router"])


DAMAGE: list[tuple[tuple[str, ...], Any]] = [
    (("perplexity",), "x"),
    (("perplexity",), []),
    (("perplexity", "routed"), "x"),
    (("perplexity", "routed"), True),
    (("perplexity", "routed"), 0),
    (("perplexity", "routed"), float("inf")),
    (("perplexity", "dense"), -1.0),
    (("perplexity", "dense"), float("nan")),
    (("perplexity", "ratio"), None),
    (("perplexity", "ratio"), 10**399),
    (("sparsity",), None),
    (("sparsity", "ffn"), "x"),
    (("sparsity", "realized"), 2),
    (("flops_ratio",), "x"),
    (("units",), []),
    (("units", "model.layers.0.mlp"), 1),
    (("units", "model.layers.0.mlp", "keep_ratio"), "x"),
    (("units", "model.layers.0.mlp", "recoverability"), float("inf")),
    (("units", "$x_$"), {"keep_ratio": 1, "recoverability": 1}),
    (("seconds",), []),
    (("seconds", "capture"), [[[[[[[[[0]]]]]]]]]),
    (("stages",), "x"),
    (("stages",), {}),
    (("stages", "router"), []),
    (("stages", "router", "seconds"), 0),
    (("stages", "router", "cpu_seconds"), "x"),
    (("stages", "lff"), None),
    (("data",), []),
    (("data", "tokens"), "x"),
]


@pytest.mark.parametrize(("keys", "value"), DAMAGE, ids=lambda value: str(value)[:40])
def test_figures_of_other_types(tmp_path: Path, keys: tuple[str, ...], value: Any) -> None:
    metrics = good()
    holder = metrics
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=r"metrics.json: damaged \(.*\)") as refused:
        read_figures(tmp_path / "metrics.json", ["router"])
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("flags", [(), ("--force",), ("--resume",)], ids=str)
def test_an_output_that_is_a_file(
    irc_main: Main, arguments: Callable[..., list[str]], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    (tmp_path / "afile").write_text("mine")
    outcome = irc_main(*arguments(tmp_path / "afile", *PLAN, *flags))
    assert outcome.code == 2
    assert str(tmp_path / "afile") in outcome.sentence()
    assert "--output" in outcome.sentence()
    assert (tmp_path / "afile").read_text() == "mine"
