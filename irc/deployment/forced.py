"""Sessions that are told what executes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporters.onnx_interface import force_decisions
from irc.deployment.changed import open_changed
from irc.runtime.folder import open_folder
from irc.runtime.session import Runtime


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
    return open_changed(
        exported, lambda model: force_decisions(model, exported.decisions), provider, **options, forced=True
    )
