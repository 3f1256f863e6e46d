"""A model repository for Triton Inference Server: `NAME/config.pbtxt` beside `NAME/1/model.onnx`."""

from __future__ import annotations

from pathlib import Path

import onnx

from exporters.onnx import DATA, MODEL

_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
    onnx.TensorProto.INT64: "TYPE_INT64",
}


def write_repository(folder: Path, name: str) -> None:
    """Move an ONNX folder's model into version 1 of a repository and describe it.

    Args:
        folder: Holds `model.onnx` and its data; becomes the repository.
        name: Of the model, a folder of the repository.
    """
    version = folder / name / "1"
    version.mkdir(parents=True)
    for file in (MODEL, DATA):
        (folder / file).rename(version / file)
    (folder / name / "config.pbtxt").write_text(config_text(name, version / MODEL), encoding="utf-8")


def config_text(name: str, model: Path) -> str:
    """Return `config.pbtxt`, read off the model's own inputs and outputs; sizes that vary are -1.

    Triton counts no batch of its own here (max_batch_size 0), because the cache's batch is part of every shape.
    """
    graph = onnx.load(str(model), load_external_data=False).graph
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', "max_batch_size: 0"]
    for side, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            kind = value.type.tensor_type
            sizes = ", ".join(str(dim.dim_value) if dim.HasField("dim_value") else "-1" for dim in kind.shape.dim)
            lines.append(f'{side} [ {{ name: "{value.name}" data_type: {_TYPES[kind.elem_type]} dims: [ {sizes} ] }} ]')
    lines.append("instance_group [ { kind: KIND_AUTO } ]")
    return "\n".join(lines) + "\n"
