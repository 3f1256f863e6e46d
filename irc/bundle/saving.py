"""save_bundle(): writes a model as a bundle, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from irc.bundle.config import BundleConfig, DialPoint, Measured, SavedBase, UnitFigures
from irc.bundle.contents import Bundle, bundle_of
from irc.bundle.layout import ADAPTER, CARD, CONFIG, LORA, METRICS, RECIPE, is_bundle
from irc.errors import InputError
from irc.files.atomic import file_sha256, staged
from irc.files.tensors import write_safetensors
from irc.model.checkpoint import BaseModel
from irc.model.routed import RoutedForCausalLM
from irc.training.lora import WEIGHTS, save_lora

_UNTITLED = "# An informed-routing bundle\n"


@dataclass(frozen=True)
class BundleTexts:
    """The texts of a bundle: `metrics.json`, `recipe.yaml` and `README.md`."""

    metrics: str = "{}\n"
    recipe: str = "{}\n"
    card: str = _UNTITLED

    @classmethod
    def of(cls, metrics: Mapping[str, Any], recipe: Mapping[str, Any], card: str = "") -> BundleTexts:
        """Return plain data as texts."""
        return cls(
            json.dumps(metrics, indent=2) + "\n", yaml.safe_dump(dict(recipe), sort_keys=False), card or _UNTITLED
        )


def save_bundle(
    model: RoutedForCausalLM,
    folder: Path,
    metrics: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    card: str = "",
) -> None:
    """Write a bundle whole or not at all: into a folder beside `folder`, which then takes its place.

    Args:
        model: Rewritten model.
        folder: Where the bundle goes; a bundle that is already there stays whole until the new one is complete.
        metrics: Measured figures. With None, a model that was loaded from a bundle keeps the figures of that bundle
            while they hold for its weights.
        recipe: The resolved recipe. With `metrics` None, a loaded model keeps the recipe of its bundle.
        card: Text of README.md.

    Raises:
        InputError: The model is plain, or `folder` exists and is not a bundle.
    """
    if model.spec is None:
        raise InputError("a plain model has nothing to save; convert it first")
    check_replaceable(folder)
    bundle = bundle_of(model)
    with staged(folder) as staging:
        if metrics is None and bundle is not None:
            _save_again(model, bundle, staging)
        else:
            dial = bundle.config.dial if bundle is not None and bundle.turned_to is None else ()
            measured = Measured.from_metrics(metrics or {})
            config = _with_weights(model, staging, measured, dial, (recipe or {}).get("seed"))
            _write_texts(model, staging, config, BundleTexts.of(metrics or {}, recipe or {}, card))


def write_bundle(
    model: RoutedForCausalLM,
    folder: Path,
    metrics: Mapping[str, Any],
    recipe: Mapping[str, Any],
    card: str,
    dial: Sequence[DialPoint] = (),
) -> None:
    """Write the files of a finished conversion into an existing folder.

    Args:
        model: Rewritten and trained model.
        folder: Where the files go.
        metrics: As in metrics.json.
        recipe: The resolved recipe.
        card: Text of README.md.
        dial: Thresholds of the own target and of others.
    """
    config = _with_weights(model, folder, Measured.from_metrics(metrics), dial, recipe.get("seed"))
    _write_texts(model, folder, config, BundleTexts.of(metrics, recipe, card))


def check_replaceable(folder: Path) -> None:
    """Refuse to replace anything but a bundle or an empty folder, so that a mistyped path costs nothing.

    Raises:
        InputError: Something else is there.
    """
    if folder.exists() and not is_bundle(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not a bundle; give another folder", options=("output",))


def adapter_tensors(model: RoutedForCausalLM) -> dict[str, torch.Tensor]:
    """Return routers and forecasters by their names in the bundle."""
    return {name: p.detach().cpu() for name, p in model.adapter_parameters("router", "forecaster").items()}


def _save_again(model: RoutedForCausalLM, bundle: Bundle, folder: Path) -> None:
    """Write a loaded model with the recipe of its bundle, and with its figures if nothing has changed."""
    before, texts = bundle.config, bundle.texts
    kept = {name: unit.calibration_keep for name, unit in before.measured.units.items()}
    known = Measured(
        {name: UnitFigures(calibration_keep=keep) for name, keep in kept.items()},
        before.measured.sparsity,
        before.measured.text,
        before.measured.target,
    )
    # The shifts of the dial are relative to the thresholds that it was made with.
    dial = before.dial if bundle.turned_to is None else ()
    config = _with_weights(model, folder, known, dial, before.seed)
    if bundle.turned_to is None and _same_weights(config, before):
        _write_texts(
            model,
            folder,
            replace(before, base=config.base),
            BundleTexts(
                metrics=texts.get(METRICS, BundleTexts.metrics),
                recipe=texts.get(RECIPE, BundleTexts.recipe),
                card=texts.get(CARD, BundleTexts.card),
            ),
        )
        return
    saved = config.to_json(model.units)
    metrics = {"calibration_keep": kept, "target": saved["target"], "sparsity": saved["sparsity"]}
    card = f"{_UNTITLED}\nChanged since its conversion (recipe: `{RECIPE}`) and not measured again.\n"
    changed = BundleTexts.of(metrics, {}, card)
    _write_texts(model, folder, config, replace(changed, recipe=texts.get(RECIPE, changed.recipe)))


def _same_weights(config: BundleConfig, before: BundleConfig) -> bool:
    """Return whether two bundles compute the same: equal adapters, equal LoRA, the same key/value policy."""
    return (config.adapter_sha256, config.lora_sha256, config.key_policy) == (
        before.adapter_sha256,
        before.lora_sha256,
        before.key_policy,
    )


def _with_weights(
    model: RoutedForCausalLM, folder: Path, measured: Measured, dial: Sequence[DialPoint], seed: int | None
) -> BundleConfig:
    """Write adapter and LoRA, and return the configuration that goes with them."""
    assert model.spec is not None
    write_safetensors(folder / ADAPTER, adapter_tensors(model), {"format": "pt"})
    if model.lora is not None:
        save_lora(model, folder / LORA)
    return BundleConfig(
        base=_saved_base(model.base),
        spec=model.spec,
        adapter_sha256=file_sha256(folder / ADAPTER),
        measured=measured,
        dial=tuple(dial),
        key_policy=model.key_policy,
        seed=seed,
        lora=model.lora,
        lora_sha256=file_sha256(folder / LORA / WEIGHTS) if model.lora is not None else None,
    )


def _saved_base(base: BaseModel) -> SavedBase:
    local = Path(base.name).exists() and base.name != "demo"
    name = str(Path(base.name).resolve()) if local else base.name
    return SavedBase(name=name, sha256=base.sha256(), architecture=base.config.model_type)


def _write_texts(model: RoutedForCausalLM, folder: Path, config: BundleConfig, texts: BundleTexts) -> None:
    _write(folder / METRICS, texts.metrics)
    _write(folder / RECIPE, texts.recipe)
    _write(folder / CARD, texts.card)
    _write(folder / CONFIG, json.dumps(config.to_json(model.units), indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


__all__ = ["BundleTexts", "adapter_tensors", "check_replaceable", "save_bundle", "write_bundle"]
