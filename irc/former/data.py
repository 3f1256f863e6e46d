"""Formerly `irc.data`; now `irc.text.source`."""

from irc.text.source import TextSource, load_text

__all__ = ["TextSource", "load_text"]
