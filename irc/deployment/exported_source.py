"""Opens what an ONNX folder was exported from."""

from __future__ import annotations

from pathlib import Path

from irc.bundle.loading import open_model
from irc.bundle.source import ModelSource
from irc.errors import InputError
from irc.model.routed import RoutedForCausalLM
from irc.recipe.key_policy import KeyPolicy
from irc.runtime.folder import OnnxFolder


def open_source(
    folder: Path, exported: OnnxFolder, bundle: str | None = None, base: str | None = None, dtype: str | None = None
) -> tuple[str, RoutedForCausalLM]:
    """Open the source of a folder on the CPU, with the folder's key/value policy and its place on the dial.

    Args:
        folder: Its path.
        exported: The folder.
        bundle: What it was exported from, if that has moved.
        base: Where the bundle's base model is, if it has moved.
        dtype: As for `ModelSource`; by default what the folder computes in.

    Returns:
        The name of the source, and the model.

    Raises:
        InputError: It is not there any more, or something else is.
    """
    source = bundle or exported.source
    if bundle is None and Path(source).is_absolute() and not Path(source).exists():
        raise InputError(
            f"{folder}: what it was exported from ({exported.manifest['source']}) is not there; say where it is now",
            options=("bundle",),
        )
    model = open_model(
        ModelSource(
            source,
            base=base,
            dtype=dtype or exported.dtype,
            device="cpu",
            key_policy=_key_policy(exported),
            sparsity=exported.dial,
            flops=exported.dial_flops,
            ask_hub=bundle is not None,
        )
    )
    if bool(model.spec) != bool(exported.decisions):
        raise InputError(
            f"{folder}: was not exported from {source}: only one of the two routes tokens", options=("bundle",)
        )
    return source, model


def _key_policy(exported: OnnxFolder) -> KeyPolicy | None:
    """Return the policy that a folder was exported under; None where every token's keys are stored."""
    if not exported.cache.reduced:
        return None
    return KeyPolicy("reduced", float(exported.manifest["kv_threshold"]))
