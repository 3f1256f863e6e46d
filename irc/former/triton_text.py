"""Formerly `irc.triton_text`, which exported Triton repositories import; now `irc.runtime.triton_backend`."""

from irc.runtime.triton_backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
