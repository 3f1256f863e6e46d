"""Bundles: what `irc convert` writes and `irc.load` reads."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from irc.bundle.loading import load
    from irc.bundle.saving import save_bundle

__all__ = ["load", "save_bundle"]


def __getattr__(name: str) -> object:
    """Import `load` and `save_bundle` on first use, so that `irc.bundle.layout` is read without torch."""
    if name == "load":
        from irc.bundle.loading import load

        return load
    if name == "save_bundle":
        from irc.bundle.saving import save_bundle

        return save_bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
