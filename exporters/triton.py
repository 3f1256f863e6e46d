"""A model repository for Triton Inference Server: one model on tensors, and one on text.

`NAME` runs `model.onnx` on Triton's onnxruntime backend; its caches travel with every request. `NAME_text` runs on
Triton's Python backend, where irc is installed: it takes prompts, returns text, and keeps caches on the server.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from exporters.onnx_dtypes import of_code
from exporters.onnx_format import DATA, MODEL, REQUEST_OPTIONS

_MOST_WAITING, _LONGEST_WAIT = 64, 60_000_000  # requests; microseconds
_TEXT_MODEL = '''"""Found here by Triton's Python backend, in whose Python irc is installed."""

from irc.runtime.triton_backend import TritonPythonModel  # noqa: F401
'''


def write_repository(folder: Path, name: str, ops_library: str | None = None) -> None:
    """Move an ONNX folder's model into version 1 of a repository and describe it, on tensors and on text.

    Args:
        folder: Holds `model.onnx` and its data; becomes the repository.
        name: Of the model, a folder of the repository; `NAME_text` is the other's.
        ops_library: Path, on the server, of the native operator library that `NAME` registers; None for no library.
    """
    version = folder / name / "1"
    version.mkdir(parents=True)
    for file in (MODEL, DATA):
        (folder / file).rename(version / file)
    config = config_text(name, version / MODEL, ops_library)
    (folder / name / "config.pbtxt").write_text(config, encoding="utf-8")
    text = f"{name}_text"
    (folder / text / "1").mkdir(parents=True)
    (folder / text / "1" / "model.py").write_text(_TEXT_MODEL, encoding="utf-8")
    (folder / text / "config.pbtxt").write_text(text_config(text), encoding="utf-8")


def config_text(name: str, model: Path, ops_library: str | None = None) -> str:
    """Return `config.pbtxt`, made from the model's inputs and outputs; sizes that vary are -1.

    Inputs that have a default are left out: Triton asks for a value of every input that it knows.

    Triton adds no batch dimension (max_batch_size 0), because the cache's batch is part of every shape.
    """
    graph = onnx.load(str(model), load_external_data=False).graph
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', "max_batch_size: 0"]
    optional = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in optional]
    for side, values in (("input", inputs), ("output", graph.output)):
        for value in values:
            kind = value.type.tensor_type
            sizes = ", ".join(str(dim.dim_value) if dim.HasField("dim_value") else "-1" for dim in kind.shape.dim)
            dtype = of_code(kind.elem_type).triton
            lines.append(f'{side} [ {{ name: "{value.name}" data_type: {dtype} dims: [ {sizes} ] }} ]')
    if ops_library is not None:
        quoted = ops_library.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'model_operations {{ op_library_filename: "{quoted}" }}')
    lines.append("instance_group [ { kind: KIND_AUTO } ]")
    return "\n".join(lines) + "\n"


def text_config(name: str) -> str:
    """Return `config.pbtxt` of the model on text: one text at a time, a bounded queue, streaming on request."""
    lines = [f'name: "{name}"', 'backend: "python"', "max_batch_size: 1"]
    lines.append('input [ { name: "prompt" data_type: TYPE_STRING dims: [ 1 ] } ]')
    for option, kind in REQUEST_OPTIONS.items():
        size = -1 if option == "stop" else 1
        lines.append(f'input [ {{ name: "{option}" data_type: {kind} dims: [ {size} ] optional: true }} ]')
    for output, kind in (("text", "TYPE_STRING"), ("stopped", "TYPE_STRING"), ("skipped", "TYPE_FP32")):
        lines.append(f'output [ {{ name: "{output}" data_type: {kind} dims: [ 1 ] }} ]')
    lines.append("model_transaction_policy { decoupled: true }")
    waiting = f"max_queue_size: {_MOST_WAITING} default_timeout_microseconds: {_LONGEST_WAIT} timeout_action: REJECT"
    lines.append(f"dynamic_batching {{ default_queue_policy {{ {waiting} }} }}")
    lines.append("instance_group [ { kind: KIND_CPU count: 1 } ]")  # of the Python process; irc takes the GPU itself
    return "\n".join(lines) + "\n"
