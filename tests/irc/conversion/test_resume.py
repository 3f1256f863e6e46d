"""Work resumes only with the same recipe, model and text, and a saved recipe means the same from any folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from irc.conversion import pipeline
from irc.conversion.resume import INPUTS, check_same_recipe, with_absolute_paths
from irc.errors import InputError
from irc.recipe.recipe import Recipe, load_recipe


@pytest.fixture
def inputs(model_folder: Path, text_file: Path, tmp_path: Path) -> Path:
    """A folder with a model and a text of its own, which a test may change."""
    shutil.copytree(model_folder, tmp_path / "here/model")
    shutil.copyfile(text_file, tmp_path / "here/text.txt")
    return tmp_path / "here"


@pytest.fixture
def recipe(inputs: Path, convert_arguments: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe that names them from that folder."""
    monkeypatch.chdir(inputs)
    arguments = convert_arguments(inputs / "b")
    settings = [arguments[index + 1] for index, word in enumerate(arguments) if word == "--set"]
    return load_recipe(None, ["model=model", "data=text.txt", "seq_len=16", "rank=4", "device=cpu", *settings])


def _another_text(inputs: Path) -> None:
    text = inputs / "text.txt"
    text.write_text(text.read_text().replace("the", "one"))


def _other_weights(inputs: Path) -> None:
    path = inputs / "model/model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, path, {"format": "pt"})


CHANGES = [
    (_another_text, "text.txt"),
    (_other_weights, "at model"),
]


@pytest.mark.parametrize(("change", "place"), CHANGES)
def test_killed_work_is_not_continued_with_other_inputs(
    recipe: Recipe, inputs: Path, bars: Any, killed: type[BaseException], change: Callable[[Path], None], place: str
) -> None:
    kept = {path: path.read_bytes() for path in (inputs / "text.txt", inputs / "model/model.safetensors")}
    output = inputs / "b"
    with pytest.raises(killed):
        pipeline.convert(recipe, output, bars(("router", 2)))
    change(inputs)
    with pytest.raises(InputError, match=rf"b\.partial: .*{place}"):
        pipeline.convert(recipe, output, bars(), resume=True)
    for path, content in kept.items():
        path.write_bytes(content)
    pipeline.convert(recipe, output, bars(), resume=True)
    assert (output / "metrics.json").is_file()


@pytest.mark.parametrize(("change", "place"), CHANGES)
def test_a_finished_bundle_of_other_inputs_is_not_the_result(
    recipe: Recipe, inputs: Path, bars: Any, change: Callable[[Path], None], place: str
) -> None:
    output = inputs / "b"
    made = pipeline.convert(recipe, output, bars())
    assert pipeline.convert(recipe, output, bars(), resume=True)["perplexity"] == made["perplexity"]
    change(inputs)
    with pytest.raises(InputError, match=place):
        pipeline.convert(recipe, output, bars(), resume=True)


def test_a_damaged_note_is_said(recipe: Recipe, inputs: Path, bars: Any, killed: type[BaseException]) -> None:
    with pytest.raises(killed):
        pipeline.convert(recipe, inputs / "b", bars(("router", 2)))
    (inputs / "b.partial" / INPUTS).write_text("[]")
    with pytest.raises(InputError, match=INPUTS):
        pipeline.convert(recipe, inputs / "b", bars(), resume=True)


def test_the_saved_recipe_makes_the_same_bundle_from_another_folder(
    recipe: Recipe, inputs: Path, bars: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.convert(recipe, inputs / "b", bars())
    saved = yaml.safe_load((inputs / "b/recipe.yaml").read_text())
    assert (saved["model"], saved["data"]) == (str(inputs / "model"), str(inputs / "text.txt"))
    monkeypatch.chdir(tmp_path)
    again = pipeline.convert(load_recipe(inputs / "b/recipe.yaml"), tmp_path / "again", bars())
    one, other = (load_file(folder / "irc_adapter.safetensors") for folder in (inputs / "b", tmp_path / "again"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    assert (inputs / "b/recipe.yaml").read_text() == (tmp_path / "again/recipe.yaml").read_text()
    assert again["perplexity"]["routed"] > 1


def test_names_that_are_no_paths_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    for model, data in (("demo", "stdlib"), ("meta-llama/Llama-3.2-1B", "hf:wikitext:x"), ("demo", "stdlib-tests")):
        assert with_absolute_paths(Recipe(model=model, data=[data])) == Recipe(model=model, data=[data])
    (tmp_path / "m").mkdir()
    assert with_absolute_paths(Recipe(model="m/../m")).model == str(tmp_path / "m")


@pytest.mark.parametrize("output", [".", "..", "here"])
def test_the_working_folder_is_refused_before_any_work(
    recipe: Recipe, inputs: Path, bars: Any, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if output == "here":
        monkeypatch.chdir(inputs.parent / "here")
        output = str(inputs)
    for more in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(InputError, match="is the working folder"):
            pipeline.convert(recipe, Path(output), bars(("lff", 1)), **more)


def test_a_rank_for_all_units_is_another_recipe_than_one_for_attention(tmp_path: Path) -> None:
    saved = tmp_path / "recipe.yaml"
    begun = Recipe()
    begun.fit_ranks(64)
    assert (begun.rank, begun.ffn_rank) == (6, 12)
    saved.write_text(yaml.safe_dump(begun.to_dict()))
    check_same_recipe(Recipe().model_copy(update={"router": begun.router.settled()}), saved)
    with pytest.raises(InputError, match="was begun with ffn_rank = 12, now it is 6"):
        check_same_recipe(Recipe(rank=6, router=begun.router.settled()), saved)
