"""What is known of a bundle: read from its folder once, then kept with the model that was loaded from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from irc.bundle.config import BundleConfig, check_present, read_config
from irc.bundle.layout import CARD, LORA, METRICS, RECIPE
from irc.errors import InputError
from irc.files.strict_yaml import parse_yaml, short_repr
from irc.files.untrusted import check_links, first_line, read_text
from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import Recipe, recipe_from
from irc.recipe.removed import without_removed
from irc.recipe.target import Target

_TEXTS = (RECIPE, METRICS, CARD)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, and how the model that was loaded from it has been set since.

    Attributes:
        folder: Where it is.
        config: What its `irc_config.json` says; `turn_dial` replaces target and keep ratios.
        texts: Recipe, metrics and card by file name, as they were read.
        unreadable: Those of them that are there and cannot be read, with the reason.
        turned_to: The target that the dial was turned to, None for the bundle's own.
        own_thresholds: Last bias of every router, [2], before the dial was turned first; empty until then.
    """

    folder: Path
    config: BundleConfig
    texts: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    turned_to: Target | None = None
    own_thresholds: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that it was converted with; the default one without a recipe file.

        Raises:
            InputError: The file cannot be used.
        """
        path = self.folder / RECIPE
        if RECIPE in self.unreadable:
            raise InputError(f"recipe {path}: cannot be read: {self.unreadable[RECIPE]}")
        if RECIPE not in self.texts:
            return Recipe()
        try:
            data = parse_yaml(self.texts[RECIPE])
        except ValueError as error:
            raise InputError(f"recipe {path}: cannot be read: {first_line(error)}") from error
        if not isinstance(data, dict):
            found = "it is empty" if data is None else f"found {short_repr(data)}"
            raise InputError(f"recipe {path}: expected keys and values such as sparsity: 0.25 ({found})")
        return recipe_from(without_removed(data, finished=True), f"recipe {path}")


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle's configuration and texts, each file once; its weights stay on disk.

    Raises:
        InputError: The folder is not a bundle, its configuration is damaged or of a newer format, or a link leads out.
    """
    check_present(folder)
    for part in (folder, folder / LORA):
        if part.is_dir():
            check_links(part)
    config = read_config(folder)
    texts, unreadable = {}, {}
    for name in _TEXTS:
        try:
            texts[name] = read_text(folder / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            unreadable[name] = first_line(error)
    return Bundle(folder, config, texts, unreadable)


def bundle_of(model: RoutedForCausalLM) -> Bundle | None:
    """Return the bundle that a model was loaded from, None for a plain model and for one that was just built."""
    return model.bundle if isinstance(model.bundle, Bundle) else None
