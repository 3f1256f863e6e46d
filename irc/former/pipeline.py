"""Formerly `irc.pipeline`; now `irc.conversion.pipeline`."""

from irc.conversion.pipeline import convert

__all__ = ["convert"]
