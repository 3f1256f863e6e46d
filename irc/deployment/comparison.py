"""Evaluates an ONNX folder beside the model that it was exported from, for `irc eval` and `irc verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irc.deployment.exported_source import open_source
from irc.deployment.quantized_weights import use_quantized_weights
from irc.evaluation.exported import FolderFigures, measure_folder
from irc.evaluation.run import TextChoice, chosen_text, texts_beside
from irc.evaluation.texts import NamedText
from irc.model.routed import RoutedForCausalLM
from irc.progress import ProgressFactory
from irc.runtime.session import Runtime


def evaluate_folder(
    folder: Path, progress: ProgressFactory, choice: TextChoice, *, bundle: str | None = None, base: str | None = None
) -> dict[str, Any]:
    """Measure how close an ONNX folder stays to the dense model in fp32.

    Args:
        folder: The output of `irc export`.
        progress: Makes progress bars.
        choice: The text to read.
        bundle: What it was exported from, if that has moved.
        base: Where the bundle's base model is, if it has moved.

    Returns:
        The JSON object of `irc eval` for a folder.

    Raises:
        InputError: The folder or its source cannot be opened, or the text cannot be read.
    """
    runtime = Runtime(folder)
    name, source = open_source(folder, runtime.exported, bundle, base, "fp32")
    text, split, seq_len, windows = chosen_text(source, name, choice, progress)
    further = texts_beside(source, seq_len, choice)
    quantized = None if source.spec is None else quantized_source(folder, runtime, bundle, base)
    figures = FolderFigures(runtime, source, quantized)
    read = {"name": text.name, "fingerprint": text.fingerprint(), "split": split, "seq_len": seq_len}
    measured = measure_folder(figures, NamedText(text.name, windows), further, progress)
    return {
        "model": str(folder),
        "bundle": name,
        "provider": runtime.provider,
        "ops": runtime.ops,
        "data": {**read, "tokens": measured.pop("tokens")},
        **measured,
    }


def quantized_source(
    folder: Path, runtime: Runtime, bundle: str | None = None, base: str | None = None
) -> RoutedForCausalLM | None:
    """Return what a folder was exported from with the folder's quantized weights; None if it has none.

    Args:
        folder: Its path.
        runtime: Of the folder.
        bundle: What it was exported from, if that has moved.
        base: Where the bundle's base model is, if it has moved.

    Raises:
        InputError: As for `open_source` and `use_quantized_weights`.
    """
    if runtime.exported.quantization is None:
        return None
    _, model = open_source(folder, runtime.exported, bundle, base)
    use_quantized_weights(model, runtime.exported)
    return model
