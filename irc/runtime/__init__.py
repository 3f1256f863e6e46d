"""Exported folders on ONNX Runtime: checked, run, continued; no module here imports torch, transformers or onnx."""

from pathlib import Path

# Modules that others import under their names of version 0.1: irc/former/runtime/ re-exports them.
__path__.append(str(Path(__file__).parents[1] / "former" / "runtime"))
