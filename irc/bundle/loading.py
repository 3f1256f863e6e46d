"""A bundle: what `irc convert` writes. Small, without the base's weights, never a pickle.

irc_config.json            format version, base and its hash, units, spec, figures of keep and recoverability
irc_adapter.safetensors    routers and forecasters
lora/                      a peft folder, when trained
recipe.yaml                the resolved recipe
metrics.json, README.md    measured figures
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from irc.bundle.config import CONFIG, FORMAT_VERSION, read_config
from irc.bundle.dial import turn_dial
from irc.bundle.key_policy import KeyPolicy, calibrated_keep, key_policy_of, set_key_policy
from irc.devices import find_device
from irc.errors import InputError
from irc.files.atomic import file_sha256, staged
from irc.files.tensors import write_safetensors
from irc.files.untrusted import check_links, first_line, read_text
from irc.model.build import build_routed
from irc.model.checkpoint import BaseModel, find_base
from irc.model.routed import RoutedForCausalLM, RoutingSpec
from irc.recipe.stages import LoraRecipe
from irc.training.lora import WEIGHTS, load_lora, save_lora

ADAPTER, LORA, METRICS, RECIPE, CARD = (
    "irc_adapter.safetensors",
    "lora",
    "metrics.json",
    "recipe.yaml",
    "README.md",
)

_UNTITLED = "# An informed-routing bundle\n"


def load(
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    sparsity: float | None = None,
) -> RoutedForCausalLM:
    """Load a bundle as a model that routes deterministically.

    Args:
        path: Bundle folder.
        base: Where the base model is, when it has moved; its weights must have the recorded hash. A hub id given
            here may be downloaded, one that the bundle names is looked for in the local cache alone.
        dtype: `auto` (fp32, for checkpoints of over 2 GB bf16), `fp32`, `fp16` or `bf16`.
        device: Where the model will run: `cpu`, `cuda`, `cuda:N`, `mps`, or `auto` for a GPU where there is one.
        sparsity: Another share to skip than the bundle's own, within its dial (see `irc.bundle.dial`).

    Returns:
        A transformers model in eval mode: `model(input_ids, attention_mask)`, `model.generate(...)`.

    Raises:
        InputError: The bundle is damaged, of a newer format, or the base is another one; the device is not there, or
            the dial does not reach the sparsity.
    """
    device = find_device(device)
    folder = Path(path)
    config = read_config(folder)
    for part in (folder, folder / LORA):
        if part.is_dir():
            check_links(part)
    named = config["base"]
    model_base = find_base(named["name"] if base is None else base, named.get("revision"), ask_hub=base is not None)
    found = model_base.sha256()
    if found != config["base"]["sha256"]:
        raise InputError(
            f"{folder}: made for a base whose weights hash to {config['base']['sha256'][:12]}, but {model_base.name} "
            f"hashes to {found[:12]}; point --base to the right model"
        )
    adapter = _read_adapter(folder, config["adapter_sha256"])
    if config.get("lora"):
        _check_hash(folder / LORA / WEIGHTS, config.get("lora_sha256"))
    model = build_routed(model_base, RoutingSpec(**config["spec"]), dtype, device)
    set_adapter(model, adapter, str(folder))
    if config.get("lora"):
        load_lora(model, folder / LORA, LoraRecipe(**config["lora"]))
    model.facts.update(base=model_base, bundle=folder, config=config, saved=_made_by(folder))
    if sparsity is not None:
        turn_dial(model, sparsity)
    if config.get("kv_policy", "full") != "full":
        set_key_policy(
            model,
            KeyPolicy(config["kv_policy"], config.get("kv_threshold", KeyPolicy.threshold)),
            calibrated_keep(model),
        )
    return model


def check_replaceable(folder: Path) -> None:
    """Refuse to ever replace what is not a bundle: a mistyped path must not cost a folder.

    Raises:
        InputError: Something else is there.
    """
    if folder.exists() and not (folder / CONFIG).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not a bundle; give another --output")


def _made_by(folder: Path) -> dict[str, str]:
    """Return what a bundle says of its making, as it stands in its files: recipe, figures, card."""
    found = {}
    for name in (RECIPE, METRICS, CARD):
        with suppress(OSError, ValueError):
            found[name] = read_text(folder / name)
    return found


def set_adapter(model: RoutedForCausalLM, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy saved routers and forecasters into a model; names and shapes must agree exactly."""
    parameters = model.adapter_parameters("router", "forecaster")
    for name in sorted(parameters.keys() ^ tensors.keys()):
        missing = "misses" if name in parameters else "holds an unknown"
        raise InputError(f"{where}: the adapter {missing} weight {name}; it belongs to another model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise InputError(f"{where}: {name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}")
            parameter.copy_(tensors[name])


def adapter_tensors(model: RoutedForCausalLM) -> dict[str, torch.Tensor]:
    """Return routers and forecasters by their names in the bundle."""
    return {name: p.detach().cpu() for name, p in model.adapter_parameters("router", "forecaster").items()}


def _read_adapter(folder: Path, expected: str) -> dict[str, torch.Tensor]:
    path = folder / ADAPTER
    _check_hash(path, expected)
    try:
        return dict(load_file(path))
    except Exception as error:
        raise InputError(f"{path}: not a safetensors file ({first_line(error)}); convert again") from error


def _check_hash(path: Path, expected: str | None) -> None:
    if not path.is_file():
        raise InputError(f"{path}: the file is missing; convert again")
    if file_sha256(path) != expected:
        raise InputError(
            f"{path}: its hash is not the one in {CONFIG}: the file is truncated or was changed; convert again"
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
        model: Rewritten model with its base in `facts["base"]`.
        folder: Where the bundle goes; a bundle there stays whole until the new one is complete.
        metrics: Measured figures; None for those that a loaded bundle came with, while they are of these weights.
        recipe: The resolved recipe; of a loaded bundle it is that bundle's own.
        card: Text of README.md.

    Raises:
        InputError: The model is a plain one, or what lies at `folder` is no bundle.
    """
    if model.spec is None:
        raise InputError("a plain model has nothing to save; convert it first")
    config = model.facts.get("config", {})
    again = metrics is None and bool(config)
    if again:  # of a loaded bundle: what is known of its units stays known
        metrics = {"calibration_keep": {unit["name"]: unit.get("calibration_keep") for unit in config["units"]}}
        metrics["sparsity"] = config.get("sparsity", {})
    check_replaceable(folder)
    dial = [] if "dial" in model.facts else config.get("dial", [])  # shifts are relative to the thresholds before
    with staged(folder) as staging:
        written = write_bundle(model, staging, metrics or {}, recipe or {}, card, dial)
        if again:
            _write_again(model, staging, written)


def _write_again(model: RoutedForCausalLM, folder: Path, written: dict[str, Any]) -> None:
    """Give the bundle of a loaded model the recipe of the one before, and its figures where nothing has changed."""
    before, saved = model.facts["config"], model.facts.get("saved", {})
    parts = ("adapter_sha256", "lora_sha256", "kv_policy", "kv_threshold")
    changed = "dial" in model.facts or any(written[part] != before.get(part, written[part]) for part in parts)
    if changed:
        known = {"data": before.get("data", {}), "seed": before.get("seed")}
        card = f"{_UNTITLED}\nChanged since its conversion, whose recipe is `{RECIPE}`; not measured.\n"
        texts = {RECIPE: saved.get(RECIPE), CARD: card}
    else:
        known, texts = before | {"base": written["base"]}, saved
    for name, text in texts.items():
        if text is not None:
            _write(folder / name, text)
    _write(folder / CONFIG, json.dumps(written | known, indent=2) + "\n")


def write_bundle(
    model: RoutedForCausalLM,
    folder: Path,
    metrics: dict[str, Any],
    recipe: dict[str, Any],
    card: str,
    dial: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write the files of a bundle into an existing folder; returns what its irc_config.json holds."""
    assert model.spec is not None
    base: BaseModel = model.facts["base"]
    key_policy = key_policy_of(model)
    write_safetensors(folder / ADAPTER, adapter_tensors(model), {"format": "pt"})
    if "lora" in model.facts:
        save_lora(model, folder / LORA)
    config = {
        "format_version": FORMAT_VERSION,
        "base": {
            "name": _base_name(base),
            "revision": None,
            "sha256": base.sha256(),
            "architecture": base.config.model_type,
        },
        "spec": asdict(model.spec),
        "units": [
            {"name": u.name, "kind": u.kind, "layer": u.layer, "width": u.width}
            | metrics.get("units", {}).get(u.name, {})
            | {"calibration_keep": metrics.get("calibration_keep", {}).get(u.name)}
            for u in model.units
        ],
        "sparsity": metrics.get("sparsity", {}),
        "dial": list(dial),
        "data": {key: metrics["data"][key] for key in ("name", "fingerprint", "seq_len")} if "data" in metrics else {},
        "kv_policy": key_policy.name,
        "kv_threshold": key_policy.threshold,
        "seed": recipe.get("seed"),
        "lora": asdict(model.facts["lora"]) if "lora" in model.facts else None,
        "lora_sha256": file_sha256(folder / LORA / WEIGHTS) if "lora" in model.facts else None,
        "adapter_sha256": file_sha256(folder / ADAPTER),
    }
    _write(folder / METRICS, json.dumps(metrics, indent=2) + "\n")
    _write(folder / RECIPE, yaml.safe_dump(recipe, sort_keys=False))
    _write(folder / CARD, card or _UNTITLED)
    _write(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return config


def _base_name(base: BaseModel) -> str:
    return str(Path(base.name).resolve()) if Path(base.name).is_dir() and base.name != "demo" else base.name


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


__all__ = ["CONFIG", "FORMAT_VERSION", "load", "read_config", "save_bundle"]
