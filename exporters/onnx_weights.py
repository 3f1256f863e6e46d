"""Layout of weights in the file: linears as [in, out], ready for MatMul; a tied embedding is stored once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.tensor_adapters import TorchTensor


@dataclass(frozen=True)
class WeightSource:
    """Where the numbers of a model's weights come from.

    Attributes:
        find: Returns what reads the weight that a placeholder in the model stands for, None for a weight.
        release: Called before each weight is written, so that pages read for earlier weights can leave memory.
        moments: Returns second moments of what a linear with a weight reads, float [in, in], None where they are not
            known. With it, weights in blocks are rounded by GPTQ.
    """

    find: Callable[[torch.Tensor], Callable[[], torch.Tensor] | None] | None = None
    release: Callable[[], None] | None = None
    moments: Callable[[torch.Tensor], torch.Tensor | None] | None = None


def read_placeholders(model: ir.Model, find: Callable[[torch.Tensor], Callable[[], torch.Tensor] | None]) -> None:
    """Let the weight that a placeholder stands for be read when its numbers are wanted, and not be kept."""
    for weight in model.graph.initializers.values():
        tensor = held(weight)
        if tensor is not None and weight.const_value is not None and (read := find(tensor)):
            weight.const_value = _read_later(weight.const_value, read)


def _read_later(tensor: ir.TensorProtocol, read: Callable[[], torch.Tensor]) -> ir.LazyTensor:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(lambda: TorchTensor(read()), dtype=tensor.dtype, shape=shape, name=tensor.name)


def store_transposed(model: ir.Model) -> None:
    """Replace every Transpose of a weight by a weight that is stored transposed.

    A weight that another node reads too (a tied embedding) stays as it is, and its product becomes a Gemm, which
    reads it transposed. Weights are transposed one at a time while the file is written.
    """
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" and node.inputs else None
        if weight is None or not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
            continue
        if all(user is node for user, _ in weight.uses()):
            _store(model, node, weight)
        else:
            _use_gemm(model, node, weight)


def _store(model: ir.Model, node: ir.Node, weight: ir.Value) -> None:
    tensor = weight.const_value
    assert tensor is not None
    rows, columns = (cast(int, size) for size in tensor.shape)
    turned = ir.LazyTensor(
        lambda: TorchTensor(_torch(tensor).t().contiguous()),
        dtype=tensor.dtype,
        shape=ir.Shape((columns, rows)),
        name=weight.name,
    )
    weight.const_value = turned
    weight.shape = ir.Shape((columns, rows))
    node.outputs[0].replace_all_uses_with(weight)
    model.graph.remove(node, safe=True)


def _use_gemm(model: ir.Model, node: ir.Node, weight: ir.Value) -> None:
    """Compute x @ weight.T as Reshape, Gemm(transB), Reshape."""
    for product, _ in list(node.outputs[0].uses()):
        x = product.inputs[0]
        if product.op_type != "MatMul" or x is None or weight.shape is None:
            return
        out, into = (int(cast(int, size)) for size in weight.shape)
        flat_shape = _constant(f"{weight.name}.flat", [-1, into])
        model.graph.register_initializer(flat_shape)
        flat = ir.node("Reshape", [x, flat_shape])
        gemm = ir.node("Gemm", [flat.outputs[0], weight], {"transB": 1})
        lead = ir.node("Shape", [x], {"end": -1})
        width = _constant(f"{weight.name}.width", [out])
        model.graph.register_initializer(width)
        shape = ir.node("Concat", [lead.outputs[0], width], {"axis": 0})
        result = ir.node("Reshape", [gemm.outputs[0], shape.outputs[0]])
        result.outputs[0].name = product.outputs[0].name
        result.outputs[0].type, result.outputs[0].shape = product.outputs[0].type, product.outputs[0].shape
        for made in (flat, gemm, lead, shape, result):
            made.metadata_props.update(product.metadata_props)
        model.graph.insert_before(product, [flat, gemm, lead, shape, result])
        product.outputs[0].replace_all_uses_with(result.outputs[0], replace_graph_outputs=True)
        model.graph.remove(product, safe=True)
    model.graph.remove(node, safe=True)


def _constant(name: str, values: list[int]) -> ir.Value:
    tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
    return ir.Value(name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(tensor.dtype), const_value=tensor)


def numbers(weight: ir.Value) -> NDArray[Any]:
    """Return the numbers of a weight, as float32 if NumPy does not know their type."""
    assert weight.const_value is not None
    tensor = _torch(weight.const_value)
    found: NDArray[Any] = (tensor if tensor.dtype == torch.float16 else tensor.float()).numpy()
    return found


def held(weight: ir.Value) -> torch.Tensor | None:
    """Return the tensor of the captured model that a weight is; None for others."""
    raw = getattr(weight.const_value, "raw", None)
    return raw if isinstance(raw, torch.Tensor) else None


def _torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    raw = getattr(tensor.raw if isinstance(tensor, ir.LazyTensor) else tensor, "raw", None)
    return raw.detach() if isinstance(raw, torch.Tensor) else torch.from_numpy(tensor.numpy().copy())
