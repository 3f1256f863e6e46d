"""Tests whether an ONNX Runtime execution provider really runs a node: `python -P provider_probe.py NAME`.

It runs in a process of its own, because a provider that cannot load may end the process, and writes the
reason to stderr from outside Python. It imports nothing of `irc`. The last line of stdout is a JSON object
with `usable` and `reason`.
"""

from __future__ import annotations

import contextlib
import json
import sys

_CPU = "CPUExecutionProvider"
_MODEL = bytes.fromhex(
    "08083a330a0e0a01780a0178120179220341646412034164645a0d0a017812080a060801"
    "12020a00620d0a017912080a06080112020a0042040a00100d"
)
"""The model y = x + x of float vectors, as `one_node_model("Add", ("x", "x"), "y", FP32.code, 1, {})` makes it."""


def probe(provider: str) -> tuple[bool, str]:
    """Run a one-node model on a provider.

    Args:
        provider: Its name in ONNX Runtime.

    Returns:
        Whether it ran the node itself, and the reason if not.
    """
    import numpy
    import onnxruntime

    if provider != _CPU and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed beside torch
    x = numpy.ones(2, dtype=numpy.float32)
    try:
        session = onnxruntime.InferenceSession(_MODEL, providers=[provider], enable_fallback=0)
        taken = session.get_providers()
        if taken[0] != provider:
            return False, f"ONNX Runtime silently fell back to {taken[0]}"
        if provider != _CPU:
            options = onnxruntime.SessionOptions()
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            session = onnxruntime.InferenceSession(_MODEL, options, providers=[provider], enable_fallback=0)
        (y,) = session.run(None, {"x": x})
    except Exception as error:
        return False, str(error)
    if y.tolist() != [2.0, 2.0]:
        return False, f"1 + 1 gave {y.tolist()}"
    return True, ""


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        usable, reason = probe(sys.argv[1])
    sys.stdout.write(json.dumps({"usable": usable, "reason": reason}) + "\n")
