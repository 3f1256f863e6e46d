"""Saving a loaded model: only bundles are replaced, and recipe and figures are kept while they hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import irc
from irc.bundle.config import SparsityFigures
from irc.bundle.key_policy import set_key_policy
from irc.bundle.layout import CONFIG
from irc.bundle.saving import save_bundle
from irc.errors import InputError
from irc.model.routed import RoutedForCausalLM
from irc.recipe.key_policy import KeyPolicy
from tests.irc.bundle.test_bundle import edit, files_of, loaded


@pytest.fixture
def model(make_routed: Callable[..., RoutedForCausalLM], shake: Any) -> RoutedForCausalLM:
    result: RoutedForCausalLM = shake(make_routed())
    return result


@pytest.fixture
def bundle(model: RoutedForCausalLM, tmp_path: Path) -> Path:
    save_bundle(model, tmp_path / "bundle")
    return tmp_path / "bundle"


def texts(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: (bundle / name).read_text() for name in ("recipe.yaml", "metrics.json", "README.md")}
    return found | {CONFIG: json.loads((bundle / CONFIG).read_text())}


@pytest.mark.parametrize("what", ["a file", "another folder", "a model's folder"])
def test_a_save_takes_no_other_place(model: RoutedForCausalLM, base: Any, what: str, tmp_path: Path) -> None:
    place = tmp_path / "notes"
    if what == "a file":
        place.write_text("mine")
    elif what == "another folder":
        place.mkdir()
        (place / "a.txt").write_text("mine")
    else:
        shutil.copytree(base.folder, place)
    before = files_of(tmp_path)
    for save in (model.save_pretrained, lambda folder: save_bundle(model, folder)):
        with pytest.raises(InputError, match=str(place)):
            save(place)
    assert files_of(tmp_path) == before


def test_others_may_read_what_may_be_read(bundle: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in bundle.iterdir()}
    assert len(set(modes.values())) == 1, modes


def _made(bundle: Path) -> dict[str, str]:
    """Give a bundle the files of a conversion; returns them."""
    (bundle / "recipe.yaml").write_text("sparsity: 0.4\nseed: 3\n")
    (bundle / "metrics.json").write_text('{"perplexity": {"dense": 2.0}}')
    (bundle / "README.md").write_text("# Measured\n")
    edit(bundle, lambda c: c.update(seed=3, data={"name": "t", "fingerprint": "f", "seq_len": 16}))
    edit(bundle, lambda c: c["units"][0].update(keep_ratio=0.5, recoverability=0.7))
    return texts(bundle)


@pytest.mark.parametrize("place", ["b", "elsewhere"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_what_was_measured_stays_with_weights_that_stay(
    model: RoutedForCausalLM, lora_on: Any, with_lora: bool, place: str, tmp_path: Path
) -> None:
    bundle = tmp_path / "b"
    save_bundle(lora_on(model) if with_lora else model, bundle)
    made = _made(bundle)
    irc.load(bundle).save_pretrained(tmp_path / place)
    assert texts(tmp_path / place) == made


def test_weights_that_were_changed_keep_the_recipe_and_lose_the_figures(bundle: Path, tmp_path: Path) -> None:
    made = _made(bundle)
    loaded = irc.load(bundle)
    with torch.no_grad():
        next(iter(loaded.adapter_parameters("router").values())).add_(1.0)
    loaded.save_pretrained(tmp_path / "changed")
    found = texts(tmp_path / "changed")
    config = found[CONFIG]
    assert found["recipe.yaml"] == made["recipe.yaml"]
    assert "perplexity" not in found["metrics.json"]
    assert "not measured" in found["README.md"]
    assert (config["seed"], config["data"]["fingerprint"]) == (3, "f")
    assert "keep_ratio" not in config["units"][0]


def test_a_turned_dial_and_another_key_policy_are_changes(
    make_routed: Callable[..., RoutedForCausalLM], bundle: Path, tmp_path: Path
) -> None:
    _made(bundle)
    keep = {unit.name: 0.4 for unit in make_routed().units}
    edit(bundle, lambda c: [unit.update(calibration_keep=keep[unit["name"]]) for unit in c["units"]])
    points = [{"sparsity": s, "shift": dict.fromkeys(keep, s), "keep": dict.fromkeys(keep, 1 - s)} for s in (0.1, 0.5)]
    edit(bundle, lambda c: c.update(dial=points))
    irc.load(bundle).save_pretrained(tmp_path / "same")
    irc.load(bundle, sparsity=0.3).save_pretrained(tmp_path / "turned")
    reduced = irc.load(bundle)
    set_key_policy(reduced, KeyPolicy("reduced", 0.5), keep)
    reduced.save_pretrained(tmp_path / "reduced")
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("same", "turned", "reduced")}
    assert ["not measured" in cards[name] for name in cards] == [False, True, True]
    assert loaded(tmp_path / "turned").config.measured.sparsity == SparsityFigures(target=0.3)
    assert json.loads((tmp_path / "same" / CONFIG).read_text())["dial"] == points
