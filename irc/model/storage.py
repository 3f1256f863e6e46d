"""How `save_pretrained` and `from_pretrained` reach the bundle, which is built on top of the model.

`irc/__init__.py` registers both functions, so that no module of `irc.model` imports `irc.bundle`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Storage:
    """Where routed models are kept.

    Attributes:
        save: Writes a model to a folder.
        load: Reads a model; it takes the arguments of `irc.load`.
    """

    save: Callable[[Any, Path], None]
    load: Callable[..., Any]


_registered: list[Storage] = []


def register(storage: Storage) -> None:
    """Set the storage that all models use from now on."""
    _registered[:] = [storage]


def storage() -> Storage:
    """Return the registered storage; `import irc` registers one."""
    return _registered[0]
