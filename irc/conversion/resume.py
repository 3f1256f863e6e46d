"""Whether unfinished work, or a bundle, goes on with what it was begun with: the recipe, the model and the text."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from irc.bundle.config import read_config
from irc.bundle.loading import METRICS, RECIPE
from irc.errors import InputError
from irc.files.atomic import write_whole
from irc.files.strict_yaml import parse
from irc.files.untrusted import read_json, read_text
from irc.model.checkpoint import BaseModel, find_base
from irc.recipe.recipe import Recipe, recipe_fields, recipe_from
from irc.text.source import TextSource, load_text

INPUTS = "inputs.json"
_FREE_TO_CHANGE = frozenset({"checkpoint_seconds"})


def located(recipe: Recipe) -> Recipe:
    """Return a recipe that says the same from any folder: the paths of model and text are whole."""
    return dataclasses.replace(recipe, model=_whole(recipe.model), data=_whole(recipe.data))


def _whole(name: str) -> str:
    named = name in ("demo", "stdlib", "stdlib-tests") or name.startswith("hf:")
    return name if named or not Path(name).exists() else os.path.abspath(name)


def check_same_inputs(work: Path, base: BaseModel, text: TextSource) -> None:
    """Refuse to continue work that was begun with other weights or another text, under the same names or not.

    Args:
        work: The work folder, in which both are noted the first time.
        base: Whose weights are trained round.
        text: What is trained on.

    Raises:
        InputError: Says which differs.
    """
    noted, found = work / INPUTS, {"base": base.identity(), "text": text.fingerprint()}
    if noted.is_file():
        try:
            before = read_json(noted)
        except ValueError as error:
            raise InputError(f"{noted}: damaged ({error}); start over with --force") from error
        refuse_other_inputs(work, before, found, base.name, text.name)
    else:
        write_whole(noted, json.dumps(found))


def refuse_other_inputs(where: Path, before: dict[str, Any], found: dict[str, Any], model: str, data: str) -> None:
    """Refuse inputs that differ from those before, each known by its hash.

    Raises:
        InputError: Says which differs.
    """
    for key, what in (("base", f"another model at {model}"), ("text", f"another text at {data}")):
        if before.get(key) != found[key]:
            raise InputError(f"{where}: was begun with {what}; put that back, or start over with --force")


def check_same_recipe(recipe: Recipe, saved: Path) -> None:
    """Refuse to continue work that was begun with other settings, naming the first that differs."""
    try:
        before = recipe_fields(located(recipe_from(parse(read_text(saved)))))
    except (OSError, ValueError, InputError, AttributeError) as error:
        raise InputError(f"{saved}: damaged, or of another version; start over with --force") from error
    for (key, old, _), (_, value, _) in zip(before, recipe_fields(located(recipe)), strict=True):
        automatic = (key, value) in (("rank", 0), ("dtype", "auto"))
        if key not in _FREE_TO_CHANGE and not automatic and old != value:
            raise InputError(
                f"{saved.parent}: was begun with {key} = {old}, now it is {value}; "
                "give the same settings with --resume, or start over with --force"
            )


def finished(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Return what a finished conversion measured, where it is one of this recipe, these weights and this text."""
    check_same_recipe(recipe, output / RECIPE)
    config, base, text = read_config(output), find_base(recipe.model), load_text(recipe.data)
    before = {"base": config["base"]["sha256"], "text": config.get("data", {}).get("fingerprint")}
    refuse_other_inputs(output, before, {"base": base.sha256(), "text": text.fingerprint()}, recipe.model, recipe.data)
    try:
        return read_json(output / METRICS)
    except ValueError as error:
        raise InputError(f"{output / METRICS}: damaged ({error}); start over with --force") from error
