"""A model file before it is run: where its weights lie, whether they are as large as it says, and its units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx

from exporters.onnx import Decision
from exporters.onnx_ops import DOMAIN
from irc.errors import InputError
from irc.files.untrusted import check_plain, first_line

_BITS = {
    onnx.TensorProto.FLOAT: 32,
    onnx.TensorProto.FLOAT16: 16,
    onnx.TensorProto.BFLOAT16: 16,
    onnx.TensorProto.DOUBLE: 64,
    onnx.TensorProto.INT64: 64,
    onnx.TensorProto.INT32: 32,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.BOOL: 8,
}
"""The types that `irc export` writes."""


def read_model(path: Path, files: Iterable[str]) -> onnx.ModelProto:
    """Read a model file and check every tensor in it; external ones are neither opened nor read.

    Args:
        path: Of `model.onnx`.
        files: Names of the files beside it that its weights may be in.

    Raises:
        InputError: It is no ONNX model, has weights in another file, or a tensor larger than what is there for it.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise InputError(f"{path}: not an ONNX model ({first_line(error)}); export again") from error
    sizes = {name: (path.parent / name).stat().st_size for name in files}
    for tensor in _tensors([model.graph], model.functions):
        name = f"{path}: tensor {tensor.name[:80]}"
        if tensor.data_type not in _BITS or any(size < 0 for size in tensor.dims):
            raise InputError(f"{name} has a type or shape that irc export never writes; export again")
        needed = math.prod(tensor.dims) * _BITS[tensor.data_type] // 8
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            _check_external(tensor, name, path, sizes, needed)
        elif tensor.raw_data:
            if len(tensor.raw_data) != needed:
                raise InputError(f"{name} needs {needed} bytes, {len(tensor.raw_data)} are there; export again")
        elif math.prod(tensor.dims) > _values(tensor):
            raise InputError(f"{name} needs {math.prod(tensor.dims)} values, fewer are there; export again")
    return model


def check_decisions(graph: Any, decisions: Sequence[Decision], path: Path) -> None:
    """Hold the units that a manifest lists against those that the graph decides about.

    Args:
        graph: Of an exported model.
        decisions: As the manifest has them.
        path: Of the manifest.

    Raises:
        InputError: The manifest lists a unit twice or one that the graph lacks, or leaves one out.
    """
    routed, listed = set(_differences(graph)), [decision.difference for decision in decisions]
    for decision in decisions:
        name = f"{path}: unit {decision.unit[:80]}"
        if decision != Decision.of(decision.unit) or decision.difference not in routed:
            raise InputError(f"{name} is none that the model routes; export again")
        if listed.count(decision.difference) > 1:
            raise InputError(f"{name} is listed twice; export again")
    if left := sorted(routed.difference(listed)):
        name = left[0].removesuffix(Decision.of("").difference)[:80]
        counts = f"{len(listed)} of the model's {len(routed)} routed units"
        raise InputError(f"{path}: lists {counts}, {name} is not among them; export again")


def _differences(graph: Any) -> Iterator[str]:
    """Yield what units decide by: DecideRows reads it, in format version 1 a Less before a Not before SelectRows."""
    makers = {output: node for node in graph.node for output in node.output}

    def reads(node: Any, kind: str) -> str:
        return str(node.input[0]) if node is not None and node.op_type == kind and node.input else ""

    for node in graph.node:
        if node.domain == DOMAIN:
            negation = makers.get(reads(node, "SelectRows"))  # another operator gives the rows of an expert
            difference = reads(node, "DecideRows") or reads(makers.get(reads(negation, "Not")), "Less")
            if difference:
                yield difference


def _check_external(tensor: Any, name: str, path: Path, sizes: dict[str, int], needed: int) -> None:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = check_plain(facts.get("location"), path)
    if location not in sizes:
        raise InputError(f"{name} is in {location}, which is none of this folder's weights; export again")
    try:
        offset, length = int(facts.get("offset") or 0), int(facts.get("length") or needed)
    except ValueError as error:
        raise InputError(f"{name}: its place in {location} is no number; export again") from error
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
