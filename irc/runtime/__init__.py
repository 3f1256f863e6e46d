"""Exported folders on ONNX Runtime: checked, run, continued; no module here imports torch, transformers or onnx."""

import os
from pathlib import Path

# Since 1.29, ONNX Runtime keeps an id of the machine in the home folder and sends events to Microsoft, unless this is
# set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Modules that others import under their names of version 0.1: irc/former/runtime/ re-exports them.
__path__.append(str(Path(__file__).parents[1] / "former" / "runtime"))
