"""Sessions of a folder's model after a change: a second model file with the same weights, removed once it was read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporters.onnx_format import MODEL
from irc.deployment.model_file import load_model, save_model
from irc.runtime.folder import OnnxFolder
from irc.runtime.session import Runtime


def open_changed(
    exported: OnnxFolder, change: Callable[[ir.Model], None], provider: str = "auto", **options: Any
) -> Runtime:
    """Open a session of a changed model.

    Args:
        exported: The folder; nothing in it changes.
        change: Changes the model in place.
        provider: `auto`, `cpu` or `cuda`.
        options: Further options of `Runtime`.

    Raises:
        InputError: The model is damaged, or as for `Runtime`.
    """
    model = load_model(exported)
    change(model)
    with tempfile.TemporaryDirectory(prefix="irc-changed-") as place:
        path = Path(place) / MODEL
        save_model(model, path)
        return Runtime(exported.folder, provider, **options, model_file=path)
