"""Sessions that are told what executes: they run a second model file, made from the exported one and then removed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from exporters.onnx_format import MODEL
from exporters.onnx_interface import force_decisions
from irc.deployment.model_file import load_model, save_model
from irc.runtime.folder import OnnxFolder, open_folder
from irc.runtime.session import Runtime


def write_forced(exported: OnnxFolder, path: Path) -> None:
    """Write the model of a folder with one more input, which says what executes.

    Args:
        exported: A folder whose model routes at least one unit.
        path: File to write; it holds no weights, those of the folder are used.

    Raises:
        InputError: The model is damaged.
    """
    model = load_model(exported)
    force_decisions(model, exported.decisions)
    save_model(model, path)


def open_forced(folder: Path, provider: str = "auto", **options: Any) -> Runtime:
    """Open a session whose `step` is given the decisions; a dense model has none and opens as it is.

    Args:
        folder: The output of `irc export`.
        provider: `auto`, `cpu` or `cuda`.
        options: Further options of `Runtime`.

    Raises:
        InputError: As for `Runtime`.
    """
    exported = open_folder(folder)
    if not exported.decisions:
        return Runtime(folder, provider, **options)
    with tempfile.TemporaryDirectory(prefix="irc-forced-") as place:
        path = Path(place) / MODEL
        write_forced(exported, path)
        return Runtime(folder, provider, **options, model_file=path, forced=True)
