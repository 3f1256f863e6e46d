"""The ready recipes are whole, by name, and give way to files; every field of a recipe has its help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from irc.conversion.pipeline import resolve
from irc.errors import InputError
from irc.model.modules import router_hidden
from irc.recipe.presets import read_recipe, ready_names
from irc.recipe.recipe import Recipe, load_recipe, override, recipe_fields

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


def test_a_folder_of_a_ready_recipes_name_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama-3.2-1b").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("llama-3.2-1b")).model == "meta-llama/Llama-3.2-1B"
    with pytest.raises(InputError, match=r"recipe mine: it is a folder; give a YAML file or a ready .*llama-3\.1-8b"):
        load_recipe(Path("mine"))


@pytest.mark.parametrize("content", ["", "# a remark\n", "null", "[]", "false", "0", "''", "- 1", "demo"])
def test_a_file_without_keys_is_not_taken_for_the_defaults(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"recipe.yaml: holds no keys and values .*; expected keys and values"):
        load_recipe(path)


def test_an_empty_mapping_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}\n")
    assert load_recipe(tmp_path / "recipe.yaml") == Recipe()


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


@pytest.mark.parametrize("group", ["lff", "router", "lora"])
def test_a_group_is_no_value_and_its_example_is_a_field(group: str) -> None:
    for value, shown in {"5": "5", "{steps: 5}": "{'steps': 5}"}.items():
        with pytest.raises(InputError) as refused:
            load_recipe(None, [f"{group}={value}"])
        assert str(refused.value) == (
            f"recipe: {group} is {shown}, but it is a group of fields; set one of them, such as {group}.steps"
        )
    assert f"{group}.steps" in [name for name, _, _ in recipe_fields()]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("=3", "--set =3: the key before = is missing; expected key=value, such as router.steps=500"),
        ("router.steps", "--set router.steps: expected key=value, such as router.steps=500"),
        ("router.stps=3", "recipe: unknown key router.stps; did you mean router.steps?"),
        ("sparsty=3", "recipe: unknown key sparsty; did you mean sparsity?"),
        ("lora.xyzzy=3", "recipe: unknown key lora.xyzzy; known below lora are steps, "),
        ("seed.seed=3", "recipe: unknown key seed.seed; there is nothing below seed"),
    ],
)
def test_a_setting_without_a_field_says_which_are_there(setting: str, told: str) -> None:
    with pytest.raises(InputError) as refused:
        load_recipe(None, [setting])
    assert str(refused.value).startswith(told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("router: {stps: 5}", "unknown key router.stps; did you mean router.steps?"),
        ("router: 5", "router: expected keys and values, found 5"),
        ("seed: many", "seed is 'many'; expected int"),
    ],
)
def test_what_a_file_holds_is_refused_in_its_name(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as refused:
        load_recipe(path)
    assert str(refused.value) == f"recipe {path}: {told}"
