"""The options that make up a recipe, for the commands that start from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from irc.cli.options import Decorator

if TYPE_CHECKING:
    from irc.recipe.recipe import Recipe


def recipe_option(help_text: str) -> Decorator:
    """Add --recipe. Argument `recipe_file: Path | None`."""
    kind = click.Path(path_type=Path)
    return click.option("--recipe", "recipe_file", type=kind, metavar="FILE", help=help_text)


def set_option() -> Decorator:
    """Add --set, which may be given several times. Argument `overrides: tuple[str, ...]`."""
    text = "Override a recipe field, such as router.steps=500."
    return click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=text)


def without_defaults(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that say something: None and `auto` leave the recipe as it is."""
    return {name: value for name, value in flags.items() if value not in (None, "auto")}


def text_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields `data` and `data_weights`; given texts never take the weights of a recipe file."""
    texts, weights = options["data"] or None, options["data_weights"] or None
    return {"data": texts, "data_weights": weights or ([] if texts else None)}


def recipe_of(
    path: Path | None, overrides: Sequence[str], flags: Mapping[str, Any], target: Mapping[str, float] | None = None
) -> Recipe:
    """Return the recipe that a command line describes; errors name the option that gave the value.

    If neither a recipe file nor an option names a text, models other than the demo read what they write themselves,
    mixed with source code.

    Args:
        path: Of --recipe.
        overrides: Of --set, laid over the file.
        flags: Values by field, laid over both. The flag of `seq_len` is --seq-len.
        target: What to reach if no recipe file and no option says it; by default as in `Recipe`.

    Raises:
        InputError: Two targets are given, a value is not allowed, or values do not go together.
    """
    from irc.recipe.layers import Layer, build, setting_layer
    from irc.recipe.recipe import Recipe, recipe_layer
    from irc.recipe.target import target_of
    from irc.text.source import OWN_TEXT

    target_of(flags.get("sparsity"), flags.get("flops"))  # refuses both
    layers = [setting_layer(Recipe, text, "--set") for text in overrides]
    layers += [Layer(f"--{name.replace('_', '-')}", {name: value}) for name, value in flags.items()]
    if path is not None:
        return build(Recipe, [recipe_layer(path), *layers])
    model = next((layer.values["model"] for layer in reversed(layers) if "model" in layer.values), "demo")
    data = {} if model == "demo" else {"data": [OWN_TEXT, "stdlib"]}
    return build(Recipe, [Layer("the default", {**(target or {}), **data}), *layers])
