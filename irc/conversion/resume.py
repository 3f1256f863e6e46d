"""Checks that unfinished work, or a finished bundle, continues with the same recipe, model and text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from irc.bundle.contents import read_bundle
from irc.bundle.layout import METRICS, RECIPE
from irc.errors import InputError
from irc.files.atomic import write_whole
from irc.files.strict_yaml import parse_yaml
from irc.files.untrusted import parse_json, read_json, read_text
from irc.model.checkpoint import BaseModel
from irc.model.own_text import texts_of
from irc.progress import ProgressFactory
from irc.recipe.recipe import Recipe, recipe_fields, recipe_from
from irc.recipe.stages import STAGE_NAMES
from irc.text.mixture import Mixture
from irc.text.source import OWN_TEXT

INPUTS = "inputs.json"
_FREE_TO_CHANGE = frozenset({"checkpoint_seconds", "yardstick_tokens"})
_AUTOMATIC = (  # decided by the base
    *(("rank", 0), ("ffn_rank", 0), ("dtype", "auto"), ("seq_len", None), ("train_seq_len", None)),
    *((f"{stage}.batch_size", None) for stage in STAGE_NAMES),
)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return a recipe that means the same from any folder: paths of model and text are absolute."""
    return recipe.model_copy(
        update={"model": _absolute(recipe.model), "data": [_absolute(text) for text in recipe.data]}
    )


def _absolute(name: str) -> str:
    has_own_meaning = name in ("demo", "stdlib", "stdlib-tests", OWN_TEXT) or name.startswith("hf:")
    return name if has_own_meaning or not Path(name).exists() else os.path.abspath(name)


def check_same_inputs(work: Path, base: BaseModel, text: Mixture) -> None:
    """Refuse to continue work that was begun with other weights or another text, even under the same names.

    Args:
        work: The work folder. The first call writes the identity of both there.
        base: The base model.
        text: The text.

    Raises:
        InputError: Says which of them differs.
    """
    noted = work / INPUTS
    found = {"base": base.identity(), "text": text.fingerprint()}
    if noted.is_file():
        try:
            before = read_json(noted)
        except ValueError as error:
            raise InputError(f"{noted}: damaged ({error}); start over", options=("force",)) from error
        if base.has_identity(before.get("base")):
            before["base"] = found["base"]
        _refuse_other_inputs(work, before, found, base.name, text.name)
    else:
        write_whole(noted, json.dumps(found))


def _refuse_other_inputs(where: Path, before: dict[str, Any], found: dict[str, str], model: str, data: str) -> None:
    for key, what in (("base", f"model at {model}"), ("text", f"text at {data}")):
        if before.get(key) != found[key]:
            raise InputError(
                f"{where}: was begun with another {what}; put the former one back, or start over", options=("force",)
            )


def check_same_recipe(recipe: Recipe, saved: Path) -> None:
    """Refuse to continue work that was begun with other settings.

    Args:
        recipe: Resolved recipe.
        saved: The recipe file of the work.

    Raises:
        InputError: Names the first setting that differs, or the file is damaged.
    """
    try:
        text = read_text(saved)
    except (OSError, ValueError) as error:
        raise _damaged(saved) from error
    _check_same_settings(recipe, text, saved)


def _check_same_settings(recipe: Recipe, text: str, saved: Path) -> None:
    try:
        begun = with_absolute_paths(recipe_from(parse_yaml(text)))
        if begun.router.hidden is None:  # in work of earlier versions
            begun.router.hidden = 0
        begun.router = begun.router.settled()
        begun.train_seq_len = begun.train_seq_len or begun.seq_len  # one length, in work of earlier versions
        begun.ffn_rank = begun.ffn_rank or begun.rank  # and one rank
        before = recipe_fields(begun)
    except (ValueError, InputError, AttributeError) as error:
        raise _damaged(saved) from error
    wanted = with_absolute_paths(recipe)
    wanted.ffn_rank = wanted.ffn_rank or wanted.rank
    now = recipe_fields(wanted)
    for (key, old, _), (_, value, _) in zip(before, now, strict=True):
        if key not in _FREE_TO_CHANGE and (key, value) not in _AUTOMATIC and old != value:
            raise InputError(
                f"{saved.parent}: was begun with {key} = {old}, now it is {value}; resume with the same settings, or "
                "start over",
                options=("resume", "force"),
            )


def _damaged(saved: Path) -> InputError:
    return InputError(f"{saved}: damaged, or of another version; start over", options=("force",))


def finished_metrics(recipe: Recipe, output: Path, base: BaseModel, progress: ProgressFactory) -> dict[str, Any]:
    """Return the metrics of a finished conversion with this recipe, these weights and this text.

    Args:
        recipe: Resolved recipe.
        output: The finished bundle.
        base: The recipe's model.
        progress: Makes a progress bar if the model's own text has to be sampled again.

    Raises:
        InputError: The bundle was made with another recipe, model or text, or is damaged.
    """
    bundle = read_bundle(output)
    if RECIPE not in bundle.texts:
        raise _damaged(output / RECIPE)
    _check_same_settings(recipe, bundle.texts[RECIPE], output / RECIPE)
    text = texts_of(recipe, base, progress, recipe.device)
    before = {"base": bundle.config.base.sha256, "text": bundle.config.measured.text.fingerprint}
    found = {"base": base.sha256(), "text": text.fingerprint()}
    _refuse_other_inputs(output, before, found, recipe.model, recipe.data_name)
    try:
        if METRICS not in bundle.texts:
            raise ValueError(bundle.unreadable.get(METRICS, "the file is missing"))
        return parse_json(bundle.texts[METRICS])
    except ValueError as error:
        raise InputError(f"{output / METRICS}: damaged ({error}); start over", options=("force",)) from error
