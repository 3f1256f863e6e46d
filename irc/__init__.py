"""The informed routing compiler: learned token routing around the attention and FFN units of a dense model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from irc.model import storage

if TYPE_CHECKING:
    from irc.bundle.loading import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]
# Modules that others import under their names of version 0.1: irc/former/ re-exports them.
__path__.append(str(Path(__file__).with_name("former")))


def __getattr__(name: str) -> object:
    """Import `load` on first use, so that `import irc` does not import torch."""
    if name == "load":
        from irc.bundle.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _save(model: Any, folder: Path) -> None:
    from irc.bundle.saving import save_bundle

    save_bundle(model, folder)


def _load(*args: Any, **kwargs: Any) -> Any:
    from irc.bundle.loading import load

    return load(*args, **kwargs)


storage.register(storage.Storage(save=_save, load=_load))
