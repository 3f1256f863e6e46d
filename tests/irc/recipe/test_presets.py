"""The ready recipes are complete, are found by name, and give way to files of the same name."""

from __future__ import annotations

from pathlib import Path

import pytest

from irc.conversion.pipeline import resolve
from irc.errors import InputError
from irc.recipe.presets import read_recipe, ready_names
from irc.recipe.recipe import Recipe, load_recipe

WIDTHS = {"llama-3.1-8b": 4096, "llama-3.2-1b": 2048, "llama-3.2-3b": 3072}


@pytest.mark.parametrize("name", ready_names())
def test_every_ready_recipe_is_a_recipe(name: str) -> None:
    stem, _, share = name.rpartition("-")
    recipe = resolve(load_recipe(Path(name)))
    assert recipe.model.lower() == f"meta-llama/{stem}"
    assert recipe.sparsity == int(share) / 100
    recipe.fit_ranks(WIDTHS[stem])
    assert (recipe.rank, recipe.ffn_rank) == (100, 100)  # the paper's
    taught = recipe.sparsity <= 0.5  # and then left as they are
    assert (recipe.router.hidden, recipe.router.lr) == ((2, 0) if taught else (0, 5e-3))
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
    with pytest.raises(InputError, match=r"recipe mine: .*llama-3\.1-8b"):
        load_recipe(Path("mine"))


@pytest.mark.parametrize("content", ["", "# a remark\n", "null", "[]", "false", "0", "''", "- 1", "demo"])
def test_a_file_without_keys_is_not_taken_for_the_defaults(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"recipe.yaml: .*keys and values"):
        load_recipe(path)


def test_an_empty_mapping_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}\n")
    assert load_recipe(tmp_path / "recipe.yaml") == Recipe()


def test_a_wrong_name_says_the_right_ones() -> None:
    with pytest.raises(InputError, match=r"llama-3\.2-2b: .*llama-3\.1-8b, .*-25, -40, -70"):
        read_recipe(Path("llama-3.2-2b"))
