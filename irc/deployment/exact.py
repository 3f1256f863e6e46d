"""Sessions of a quantized folder that compute with activations as they are, whatever its accuracy level is."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from exporters.onnx_format import MODEL
from irc.deployment.model_file import load_model, save_model
from irc.runtime.folder import OnnxFolder, open_folder
from irc.runtime.session import Runtime

_LEVEL = "accuracy_level"


def write_exact(exported: OnnxFolder, path: Path) -> None:
    """Write the model of a folder at accuracy level 0.

    Args:
        exported: A folder with quantized weights.
        path: File to write; it holds no weights, those of the folder are used.

    Raises:
        InputError: The model is damaged.
    """
    model = load_model(exported)
    for node in model.graph.all_nodes():
        node.attributes.pop(_LEVEL, None)
    save_model(model, path)


def open_exact(folder: Path, provider: str = "auto", **options: Any) -> Runtime:
    """Open a session at accuracy level 0; other folders than quantized ones open as they are.

    Args:
        folder: The output of `irc export`.
        provider: `auto`, `cpu` or `cuda`.
        options: Further options of `Runtime`.

    Raises:
        InputError: As for `Runtime`.
    """
    exported = open_folder(folder)
    if exported.quantization is None or not exported.quantization.accuracy_level:
        return Runtime(folder, provider, **options)
    with tempfile.TemporaryDirectory(prefix="irc-exact-") as place:
        path = Path(place) / MODEL
        write_exact(exported, path)
        return Runtime(folder, provider, **options, model_file=path)
