"""Weights in blocks of 4 or 8 bits: products become MatMulNBits, the embedding GatherBlockQuantized (`com.microsoft`).

ONNX Runtime's own quantizer packs each weight. Activations keep their type. Routers and forecasters keep their weights:
they are operators of their own, and a route must not move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx_format import Quantization

DOMAIN = "com.microsoft"
PACKED, SCALES, ZEROS = "packed", "scales", "zero_points"
"""Ends of the names of what replaces a weight: `model.layers.0.mlp.up_proj.weight.packed`."""

_ROWS = 4096  # of a weight, packed at a time
_KEPT = ("_router.", "_forecaster.", ".gate.")  # parts of names: what passes inserted, and what chooses experts


@dataclass(frozen=True)
class Blocks:
    """A quantized weight.

    Attributes:
        packed: uint8 [out, blocks, bytes of a block]; of an embedding without a product [out, bytes].
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
    packed = np.zeros((out, count, how.block_size * how.bits // 8), np.uint8)
    scales = np.zeros((out, count), weight.dtype)
    zeros = np.zeros((out, -(-count * how.bits // 8)), np.uint8)
    pack = ort.quantize_matmul_4bits if how.bits == 4 else ort.quantize_matmul_8bits
    for rows in parts(out, _ROWS):  # a transposed copy of an embedding would set the export's memory peak
        some = weight[rows]
        turned = np.zeros((count * how.block_size, len(some)), weight.dtype)
        turned[:inputs] = some.T
        pack(packed[rows], turned, scales[rows], zeros[rows], how.block_size, len(some), inputs, how.symmetric)
    return Blocks(packed, scales, None if how.symmetric else zeros)


def parts(count: int, size: int) -> Iterator[slice]:
    """Return the ranges of `size` that `count` consists of; the last may be shorter."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def shapes_of(out: int, inputs: int, how: Quantization) -> list[list[tuple[int, ...]]]:
    """Return the shapes that the blocks of a weight [out, inputs] have, as part of a product and as embedding alone."""
    count = -(-inputs // how.block_size)
    rest: list[tuple[int, ...]] = [(out, count), *([] if how.symmetric else [(out, -(-count * how.bits // 8))])]
    return [[(out, count, how.block_size * how.bits // 8), *rest], [(out, inputs * how.bits // 8), *rest]]


def dequantize(blocks: Blocks, inputs: int, how: Quantization) -> NDArray[np.float32]:
    """Return the weight that the operators compute with, float32 [out, inputs]."""
    out, count = blocks.scales.shape
    values = _unpacked(blocks.packed.reshape(out, -1), how.bits)
    padding = count * how.block_size - values.shape[1]  # an embedding alone has none
    values = np.pad(values, ((0, 0), (0, padding))).reshape(out, count, how.block_size)
    zeros = unpacked_zeros(blocks, how)
    scales = blocks.scales.astype(np.float32)
    weight: NDArray[np.float32] = (values.astype(np.float32) - zeros.astype(np.float32)[..., None]) * scales[..., None]
    return weight.reshape(out, -1)[:, :inputs]


def unpacked_zeros(blocks: Blocks, how: Quantization) -> NDArray[np.uint8]:
    """Return the number that means zero in each block, [out, blocks]."""
    out, count = blocks.scales.shape
    if blocks.zeros is None:
        return np.full((out, count), 1 << (how.bits - 1), np.uint8)
    return _unpacked(blocks.zeros, how.bits)[:, :count]


def packed_numbers(numbers: NDArray[np.uint8], blocks: Blocks, how: Quantization) -> Blocks:
    """Return blocks of a product that hold other numbers.

    Args:
        numbers: uint8 [out, in], below 2 ** bits.
        blocks: Give scales and zero points.
        how: How they were made.
    """
    out, count = blocks.scales.shape
    padded = np.zeros((out, count * how.block_size), np.uint8)
    padded[:, : numbers.shape[1]] = numbers
    if how.bits == 4:
        padded = padded[:, ::2] | padded[:, 1::2] << 4
    return replace(blocks, packed=padded.reshape(out, count, -1))


def _unpacked(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return each number of rows of bytes, the lower half of a byte first."""
    return data if bits == 8 else np.stack((data & 15, data >> 4), axis=-1).reshape(len(data), -1)


def quantize_weights(
    model: ir.Model,
    how: Quantization,
    read: Callable[[ir.Value], NDArray[Any]],
    between: Callable[[], None] | None = None,
    again: Callable[[ir.Value, NDArray[Any], Blocks], Blocks] | None = None,
) -> list[str]:
    """Replace products with weights, and lookups in an embedding, by operators on blocks.

    Args:
        model: As torch.onnx made it: a product is a MatMul with the Transpose of a weight [out, in].
        how: How weights are quantized.
        read: Returns the numbers of a weight, float32 or float16.
        between: Called after each weight, so that pages read for it can leave memory.
        again: Rounds the weight of a product again; it is given the numbers and the nearest blocks.

    Returns:
        The names of the quantized weights.
    """
    done: list[str] = []
    for weight in list(model.graph.initializers.values()):
        products, turned, lookups = _users(weight)
        if not (products or lookups) or any(part in str(weight.name) for part in _KEPT):
            continue
        numbers = read(weight)
        blocks = quantize(numbers, how)
        if again and products:
            blocks = again(weight, numbers, blocks)
        out, inputs = (int(cast(int, size)) for size in cast(ir.Shape, weight.shape))
        width = inputs * how.bits // 8
        packed = blocks.packed if products else blocks.packed.reshape(out, -1)[:, :width]
        parts = [_initializer(model, weight, PACKED, packed), _initializer(model, weight, SCALES, blocks.scales)]
        if blocks.zeros is not None:
            parts.append(_initializer(model, weight, ZEROS, blocks.zeros))
        attributes: dict[str, Any] = {"K": inputs, "N": out, "bits": how.bits, "block_size": how.block_size}
        if how.accuracy_level:
            attributes["accuracy_level"] = how.accuracy_level
        for product in products:
            _replace(model, product, ir.node("MatMulNBits", [product.inputs[0], *parts], attributes, domain=DOMAIN))
        for node in turned:
            model.graph.remove(node, safe=True)
        if lookups:
            _look_up(model, lookups, parts, width, how)
        assert not weight.uses(), weight.name
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
    lookups = [node for node, place in weight.uses() if node.op_type == "Gather" and place == 0 and not _axis(node)]
    if len(products) != len(turned) or len(weight.uses()) != len(turned) + len(lookups):
        return [], [], []
    return products, turned, lookups


def _axis(node: ir.Node) -> int:
    axis = node.attributes.get("axis")
    return 0 if axis is None else axis.as_int()


def _look_up(model: ir.Model, lookups: list[ir.Node], parts: list[ir.Value], width: int, how: Quantization) -> None:
    """Look rows of `width` bytes up; nodes that ONNX Runtime folds show the blocks of a product as such rows."""
    packed, *others = parts
    shape = [int(cast(int, number)) for number in cast(ir.Shape, packed.shape)]
    found, nodes = packed, []
    if len(shape) > 2:
        rows = np.array([shape[0], shape[1] * shape[2]])
        nodes.append(ir.node("Reshape", [packed, _initializer(model, packed, "rows", rows)]))
        found = nodes[-1].outputs[0]
        if width < rows[1]:
            places = (("first", 0), ("end", width), ("axis", 1))
            ends = [_initializer(model, packed, name, np.array([place])) for name, place in places]
            nodes.append(ir.node("Slice", [found, *ends]))
            found = nodes[-1].outputs[0]
    attributes = {"bits": how.bits, "block_size": how.block_size, "gather_axis": 0, "quantize_axis": 1}
    for node in nodes:
        node.metadata_props.update(lookups[0].metadata_props)
        model.graph.insert_before(lookups[0], node)
    for lookup in lookups:
        read = [found, lookup.inputs[1], *others]
        _replace(model, lookup, ir.node("GatherBlockQuantized", read, attributes, domain=DOMAIN))


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
