"""The ready recipes are whole, by name, and give way to files; every field of a recipe has its help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from irc.config import Recipe, load_recipe, override, recipe_fields
from irc.errors import InputError
from irc.model.modules import router_hidden
from irc.pipeline import resolve
from irc.ready_recipes import read_recipe, ready_names

WIDTHS = {"llama-3.1-8b": 4096, "llama-3.2-1b": 2048, "llama-3.2-3b": 3072}


@pytest.mark.parametrize("name", ready_names())
def test_every_ready_recipe_is_a_recipe(name: str) -> None:
    stem, _, share = name.rpartition("-")
    recipe = resolve(load_recipe(Path(name)))
    assert recipe.model.lower() == f"meta-llama/{stem}"
    assert recipe.sparsity == int(share) / 100
    assert recipe.rank_for(WIDTHS[stem]) == 100
    assert router_hidden(WIDTHS[stem], recipe.rank) == WIDTHS[stem] // 4 - 200  # the paper's
    assert (recipe.router.steps, recipe.router.batch_size, recipe.seq_len) == (2000, 16, 2048)


def test_without_a_share_it_is_a_quarter_and_settings_come_on_top() -> None:
    assert load_recipe(Path("llama-3.2-1b")).sparsity == 0.25
    assert load_recipe(Path("llama-3.2-1b-40"), ["sparsity=0.5", "router.steps=3"]).router.steps == 3


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama-3.2-1b").write_text("sparsity: 0.1\n")
    monkeypatch.chdir(tmp_path)
    assert read_recipe(Path("llama-3.2-1b")) == {"sparsity": 0.1}


def test_a_wrong_name_says_the_right_ones() -> None:
    with pytest.raises(InputError, match=r"no such file; the ready ones are llama-3\.1-8b, .*-25, -40, -70"):
        read_recipe(Path("llama-3.2-2b"))


def test_every_field_is_listed_with_its_help_by_the_name_that_sets_it() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # a pipe: no line is broken
    command = [sys.executable, "-m", "irc", "convert", "--fields"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    recipe, names = Recipe(), []
    for name, default, text in recipe_fields():
        override(recipe, f"{name}={json.dumps(default)}")
        assert len(text) > 5
        line = next(line for line in shown.stdout.splitlines() if line.split()[:1] == [name])
        assert text in line
        names.append(name)
    assert {"sparsity", "lff.ridge", "router.target_range", "lora.targets"} <= set(names)
    assert recipe == Recipe()


USELESS = {
    "router.temperature_end=0": "router.temperature_end is 0.0; give at least 0.001",
    "lff.ridge=-1": "lff.ridge is -1.0; give at least 0",
    "lff.ridge=.nan": "lff.ridge is nan; give at least 0",
    "router.lr=.inf": "router.lr is inf; give a finite number",
    "router.start=-.inf": "router.start is -inf; give a finite number",
    "lora.alpha=0": "lora.alpha is 0; give at least 1",
    "dial=[true]": r"dial is \[True\]; give shares",
    "router.target_range=[false, true]": "router.target_range is",
}


@pytest.mark.parametrize("setting", USELESS)
def test_values_that_would_fail_only_after_training_or_mean_nothing(setting: str) -> None:
    with pytest.raises(InputError, match=USELESS[setting]):
        load_recipe(None, [setting]).check()
