"""A model file as data: its tensors are checked before anything reads them, and it is written without its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from exporters.onnx_dtypes import ALL
from irc.errors import InputError
from irc.files.untrusted import check_plain, first_line
from irc.runtime.folder import OnnxFolder

_OTHERS = {"DOUBLE": 8, "INT32": 4, "INT8": 1, "UINT8": 1}  # bytes; constants of a model may have these types
_BYTES = {kind.code: kind.bytes for kind in ALL} | {onnx.TensorProto.DataType.Value(n): b for n, b in _OTHERS.items()}


def load_model(exported: OnnxFolder) -> ir.Model:
    """Return the model of a checked folder, to be changed; its weights stay in their file.

    Raises:
        InputError: The model is not ONNX, or a tensor in it is not as `irc export` writes tensors.
    """
    try:
        return ir.serde.deserialize_model(read_model(exported.model, exported.weights))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{exported.model}: damaged ({first_line(error)}); export again") from error


def save_model(model: ir.Model, path: Path) -> None:
    """Write a model that `load_model` gave; it names its weights' file as before, and that is not touched."""
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())


def read_model(path: Path, files: Iterable[str]) -> onnx.ModelProto:
    """Read a model file and check every tensor in it; external ones are neither opened nor read.

    Args:
        path: Path of `model.onnx`.
        files: Names of the files beside it that may hold its weights.

    Raises:
        InputError: It is not an ONNX model, has weights in another file, or a tensor needs more bytes than there are.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise InputError(f"{path}: not an ONNX model ({first_line(error)}); export again") from error
    sizes = {name: (path.parent / name).stat().st_size for name in files}
    for tensor in _tensors([model.graph], model.functions):
        name = f"{path}: tensor {tensor.name[:80]}"
        if tensor.data_type not in _BYTES or any(size < 0 for size in tensor.dims):
            raise InputError(f"{name} has a type or shape that irc export never writes; export again")
        needed = math.prod(tensor.dims) * _BYTES[tensor.data_type]
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            _check_external(tensor, name, path, sizes, needed)
        elif tensor.raw_data:
            if len(tensor.raw_data) != needed:
                raise InputError(f"{name} needs {needed} bytes, {len(tensor.raw_data)} are there; export again")
        elif math.prod(tensor.dims) > _values(tensor):
            raise InputError(f"{name} needs {math.prod(tensor.dims)} values, fewer are there; export again")
    return model


def _check_external(tensor: Any, name: str, path: Path, sizes: dict[str, int], needed: int) -> None:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = check_plain(facts.get("location"), path)
    if location not in sizes:
        raise InputError(f"{name} is in {location}, which is not one of this folder's weights; export again")
    try:
        offset, length = int(facts.get("offset") or 0), int(facts.get("length") or needed)
    except ValueError as error:
        raise InputError(f"{name}: its place in {location} is not a number; export again") from error
    if offset < 0 or length != needed or offset + length > sizes[location]:
        raise InputError(
            f"{name} needs {needed} bytes from byte {offset} of {location}, which has {sizes[location]}; export again"
        )


def _values(tensor: Any) -> int:
    return max(
        len(values)
        for values in (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    )


def _tensors(graphs: Iterable[Any], functions: Iterable[Any]) -> Iterator[Any]:
    """Yield all tensors of graphs, the graphs inside their nodes, and functions."""
    nodes = [node for function in functions for node in function.node]
    waiting = list(graphs)
    while waiting or nodes:
        for graph in waiting:
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
        waiting = []
        for node in nodes:
            for attribute in node.attribute:
                yield from attribute.tensors
                if attribute.HasField("t"):
                    yield attribute.t
                for sparse in [attribute.sparse_tensor, *attribute.sparse_tensors]:
                    yield from (part for part in (sparse.values, sparse.indices) if part.ByteSize())
                waiting += attribute.graphs
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
        nodes = []
