"""Sessions of a quantized folder that compute with activations as they are, whatever its accuracy level is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from irc.deployment.changed import open_changed
from irc.runtime.folder import open_folder
from irc.runtime.session import Runtime


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
    return open_changed(exported, _at_level_0, provider, **options)


def _at_level_0(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        node.attributes.pop("accuracy_level", None)
