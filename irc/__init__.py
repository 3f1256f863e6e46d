"""The informed routing compiler: learned token routing round the attention and FFN units of a dense model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from irc.bundle import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    """Import `load` on first use, so that `import irc` does not import torch."""
    if name == "load":
        from irc.bundle import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
