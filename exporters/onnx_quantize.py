"""Weights in blocks of 4 or 8 bits: products become MatMulNBits, the embedding GatherBlockQuantized (`com.microsoft`).

ONNX Runtime's own quantizer packs each weight. Activations keep their type. Routers and forecasters keep their weights:
they are operators of their own, and a route must not move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx_format import Quantization

DOMAIN = "com.microsoft"
PACKED, SCALES, ZEROS = "packed", "scales", "zero_points"
"""Ends of the names of what replaces a weight: `model.layers.0.mlp.up_proj.weight.packed`."""

_KEPT = ("_router.", "_forecaster.")  # parts of the names of what passes inserted


@dataclass(frozen=True)
class Blocks:
    """A quantized weight.

    Attributes:
        packed: uint8 [out, blocks, bytes of a block].
        scales: [out, blocks], of the activations' type.
        zeros: uint8 [out, bytes], 4 or 8 bits for each block; None if symmetric.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[Any]
    zeros: NDArray[np.uint8] | None


def quantize(weight: NDArray[Any], how: Quantization) -> Blocks:
    """Round a weight to the nearest numbers of its blocks, with ONNX Runtime's quantizer.

    Args:
        weight: float32 or float16 [out, in].
        how: Bits, block size and symmetry.
    """
    from onnxruntime.capi import _pybind_state as ort

    out, inputs = weight.shape
    count = -(-inputs // how.block_size)
    turned = np.zeros((count * how.block_size, out), weight.dtype)
    turned[:inputs] = weight.T
    packed = np.zeros((out, count, how.block_size * how.bits // 8), np.uint8)
    scales = np.zeros((out, count), weight.dtype)
    zeros = np.zeros((out, -(-count * how.bits // 8)), np.uint8)
    pack = ort.quantize_matmul_4bits if how.bits == 4 else ort.quantize_matmul_8bits
    pack(packed, turned, scales, zeros, how.block_size, out, inputs, how.symmetric)
    return Blocks(packed, scales, None if how.symmetric else zeros)


def dequantize(blocks: Blocks, inputs: int, how: Quantization) -> NDArray[np.float32]:
    """Return the weight that the operators compute with, float32 [out, inputs]."""
    out, count = blocks.scales.shape
    values = _unpacked(blocks.packed.reshape(out, -1), how.bits).reshape(out, count, how.block_size)
    middle = 1 << (how.bits - 1)
    zeros = np.full((out, count), middle) if blocks.zeros is None else _unpacked(blocks.zeros, how.bits)[:, :count]
    scales = blocks.scales.astype(np.float32)
    weight: NDArray[np.float32] = (values.astype(np.float32) - zeros.astype(np.float32)[..., None]) * scales[..., None]
    return weight.reshape(out, -1)[:, :inputs]


def _unpacked(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return each number of rows of bytes, the lower half of a byte first."""
    return data if bits == 8 else np.stack((data & 15, data >> 4), axis=-1).reshape(len(data), -1)


def quantize_weights(
    model: ir.Model,
    how: Quantization,
    read: Callable[[ir.Value], NDArray[Any]],
    between: Callable[[], None] | None = None,
) -> list[str]:
    """Replace products with weights, and lookups in an embedding, by operators on blocks.

    Args:
        model: As torch.onnx made it: a product is a MatMul with the Transpose of a weight [out, in].
        how: How weights are quantized.
        read: Returns the numbers of a weight, float32 or float16.
        between: Called after each weight, so that pages read for it can leave memory.

    Returns:
        The names of the quantized weights.
    """
    done: list[str] = []
    for weight in list(model.graph.initializers.values()):
        products, turned, lookups = _users(weight)
        if not products or any(part in str(weight.name) for part in _KEPT):
            continue
        blocks = quantize(read(weight), how)
        out, inputs = (int(cast(int, size)) for size in cast(ir.Shape, weight.shape))
        parts = [_initializer(model, weight, PACKED, blocks.packed), _initializer(model, weight, SCALES, blocks.scales)]
        if blocks.zeros is not None:
            parts.append(_initializer(model, weight, ZEROS, blocks.zeros))
        attributes: dict[str, Any] = {"K": inputs, "N": out, "bits": how.bits, "block_size": how.block_size}
        if how.accuracy_level:
            attributes["accuracy_level"] = how.accuracy_level
        for product in products:
            _replace(model, product, ir.node("MatMulNBits", [product.inputs[0], *parts], attributes, domain=DOMAIN))
        for node in turned:
            model.graph.remove(node, safe=True)
        if lookups and inputs % how.block_size == 0:
            _look_up(model, lookups, parts, inputs, how)
        if not weight.uses():
            del model.graph.initializers[cast(str, weight.name)]
        done.append(str(weight.name))
        if between:
            between()
    if done:
        model.opset_imports[DOMAIN] = 1
    return done


def _users(weight: ir.Value) -> tuple[list[ir.Node], list[ir.Node], list[ir.Node]]:
    """Return the products that read a weight, the Transposes between them, and the lookups of its rows."""
    turned = [node for node, _ in weight.uses() if node.op_type == "Transpose"]
    products = [
        user
        for node in turned
        for user, place in node.outputs[0].uses()
        if user.op_type == "MatMul" and place == 1 and user.domain == ""
    ]
    if weight.shape is None or len(weight.shape) != 2 or any(len(node.outputs[0].uses()) != 1 for node in turned):
        return [], [], []
    if len(products) != len(turned):
        return [], [], []
    lookups = [node for node, place in weight.uses() if node.op_type == "Gather" and place == 0]
    return products, turned, lookups


def _look_up(model: ir.Model, lookups: list[ir.Node], parts: list[ir.Value], inputs: int, how: Quantization) -> None:
    """Look rows up in the blocks of a product, which a reshape shows as rows."""
    packed, *others = parts
    assert packed.shape is not None
    width = inputs * how.bits // 8
    shape = ir.Value(
        name=f"{packed.name}.rows",
        shape=ir.Shape([2]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(
            [int(cast(int, packed.shape[0])), width], dtype=ir.DataType.INT64, name=f"{packed.name}.rows"
        ),
    )
    model.graph.register_initializer(shape)
    for lookup in lookups:
        rows = ir.node("Reshape", [packed, shape])
        attributes = {"bits": how.bits, "block_size": how.block_size, "gather_axis": 0, "quantize_axis": 1}
        found = ir.node("GatherBlockQuantized", [rows.outputs[0], lookup.inputs[1], *others], attributes, domain=DOMAIN)
        rows.metadata_props.update(lookup.metadata_props)
        model.graph.insert_before(lookup, rows)
        _replace(model, lookup, found)


def _initializer(model: ir.Model, weight: ir.Value, end: str, data: NDArray[Any]) -> ir.Value:
    tensor = ir.Tensor(data, name=f"{weight.name}.{end}")
    value = ir.Value(name=tensor.name, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _replace(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    output, before = new.outputs[0], old.outputs[0]
    output.name, output.type, output.shape = before.name, before.type, before.shape
    new.metadata_props.update(old.metadata_props)
    model.graph.insert_before(old, new)
    before.replace_all_uses_with(output, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)
