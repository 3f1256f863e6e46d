"""load() and open_model(): from a bundle, or a plain model, to a model that runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from irc.bundle.contents import Bundle, read_bundle
from irc.bundle.dial import turn_dial
from irc.bundle.key_policy import calibrated_keep, set_key_policy
from irc.bundle.layout import ADAPTER, CONFIG, LORA, is_bundle
from irc.bundle.source import ModelSource, as_source
from irc.devices import find_device
from irc.errors import InputError
from irc.files.atomic import file_sha256
from irc.files.untrusted import check_pulled, first_line
from irc.model.build import build_plain, build_routed
from irc.model.checkpoint import BaseModel, find_base
from irc.model.routed import RoutedForCausalLM
from irc.training.lora import WEIGHTS, load_lora


def load(
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    sparsity: float | None = None,
    flops: float | None = None,
) -> RoutedForCausalLM:
    """Load a bundle as a model that routes deterministically.

    Args:
        path: Bundle folder.
        base: Where the base model is, if it has moved; its weights must have the recorded hash. A hub id that you give
            here may be downloaded. One that the bundle names is only looked for in the local cache.
        dtype: `auto` (fp32, or bf16 for checkpoints over 2 GB), `fp32`, `fp16` or `bf16`.
        device: Where the model will run: `cpu`, `cuda`, `cuda:N`, `mps`, or `auto` for a GPU if there is one.
        sparsity: Share to skip that replaces the bundle's own, within its dial (see `irc.bundle.dial`).
        flops: FLOPs ratio, routed over dense, that replaces the bundle's own, if it was converted for one.

    Returns:
        A transformers model in eval mode: `model(input_ids, attention_mask)`, `model.generate(...)`.

    Raises:
        InputError: The bundle is damaged or of a newer format, its base has other weights, the device is not
            available, or the dial does not reach the target.
    """
    source = ModelSource(os.fspath(path), base, dtype, find_device(device), sparsity=sparsity, flops=flops)
    return _load_routed(read_bundle(Path(path)), source)


def open_model(model: ModelSource | str) -> RoutedForCausalLM:
    """Open a bundle, or capture a plain model.

    Args:
        model: Which one, and how. A name alone is opened with the defaults of `ModelSource`.

    Raises:
        InputError: As `load`; or a plain model is to have a target or a key/value policy.
    """
    source = as_source(model)
    source = replace(source, device=find_device(source.device))
    if is_bundle(Path(source.name)):
        bundle = read_bundle(Path(source.name))
        made_with = bundle.recipe.dtype
        if source.dtype == "auto":  # so that the figures of the conversion come out again
            source = replace(source, dtype=made_with)
        return _load_routed(bundle, source)
    for setting, value in (("target", source.target), ("key/value policy", source.key_policy)):
        if value is not None:
            raise InputError(f"{source.name}: a plain model skips no token, so it has no {setting}; convert it first")
    base = find_base(source.name, ask_hub=source.ask_hub)
    return build_plain(base, source.dtype, source.device, as_stored=source.as_stored)


def _load_routed(bundle: Bundle, source: ModelSource) -> RoutedForCausalLM:
    """Return a bundle's model on its base, set as the source says."""
    folder, config, target = bundle.folder, bundle.config, source.target
    base = _checked_base(bundle, source)
    adapter = read_adapter(folder, config.adapter_sha256)
    if config.lora is not None:
        _check_hash(folder / LORA / WEIGHTS, config.lora_sha256)
    as_stored = source.as_stored and config.lora is None
    model = build_routed(base, config.spec, source.dtype, source.device, as_stored=as_stored)
    set_adapter(model, adapter, str(folder))
    if config.lora is not None:
        load_lora(model, folder / LORA, config.lora)
    model.bundle = bundle
    if target is not None:
        turn_dial(model, target)
    model.key_policy = config.key_policy
    if source.key_policy is not None or config.key_policy.name != "full":
        set_key_policy(model, source.key_policy or config.key_policy, calibrated_keep(model))
    return model


def _checked_base(bundle: Bundle, source: ModelSource) -> BaseModel:
    """Return the base model, whose weights must be those that the bundle was made for."""
    saved = bundle.config.base
    if isinstance(source.base, BaseModel):
        base = source.base
    else:
        name = saved.name if source.base is None else source.base
        base = find_base(name, saved.revision, ask_hub=source.base is not None)
    found = base.sha256()
    if found != saved.sha256:
        raise InputError(
            f"{bundle.folder}: made for a base whose weights hash to {saved.sha256[:12]}, but {base.name} hashes to "
            f"{found[:12]}; give the base that it was made for",
            options=("base",),
        )
    return base


def set_adapter(model: RoutedForCausalLM, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy saved routers and forecasters into a model.

    Args:
        model: Rewritten model.
        tensors: By their names in the bundle; names and shapes must agree with the model's exactly.
        where: The file or folder that they come from.

    Raises:
        InputError: Names the tensor that differs.
    """
    parameters = model.adapter_parameters("router", "forecaster")
    for name in sorted(parameters.keys() ^ tensors.keys()):
        problem = f"lacks weight {name}" if name in parameters else f"holds an unknown weight {name}"
        raise InputError(f"{where}: the adapter {problem}; it belongs to another model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise InputError(f"{where}: {name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}")
            parameter.copy_(tensors[name])


def read_adapter(folder: Path, expected: str) -> dict[str, torch.Tensor]:
    """Read the routers and forecasters of a bundle.

    Args:
        folder: Of the bundle.
        expected: SHA-256 of the file.

    Raises:
        InputError: The file is missing, has another hash, or is not a safetensors file.
    """
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
        check_pulled(path)
        raise InputError(
            f"{path}: its hash is not the one in {CONFIG}: the file is truncated or was changed; convert again"
        )


__all__ = ["load", "open_model", "read_adapter", "set_adapter"]
