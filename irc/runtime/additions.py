"""What the runtime adds to a model in memory; its file stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from exporters.onnx import Decision

FORCED, DIFFERENCES, FIRST = "irc.forced_differences", "irc.logit_differences", "irc.first_token"
_PRODUCT = "MatMul"
_EACH_NUMBER = ("Add", "Cast", "Div", "Mul", "Tanh")
_OF_WEIGHTS = ("Cast", "Transpose")


def add_decisions(graph: Any, decisions: Sequence[Decision], forced: bool) -> None:
    """Make the logit differences of all units one more output, `DIFFERENCES`.

    Args:
        graph: Of an exported model.
        decisions: Of its units.
        forced: Whether one more input, `FORCED`, says what executes, as differences of 1 and -1; the routers run all
            the same, for the output reads them.
    """
    if not decisions:
        return
    differences = made = [decision.difference for decision in decisions]
    if forced:
        made = [f"{name}.own" for name in differences]
        own = dict(zip(differences, made, strict=True))
        for node in graph.node:
            node.output[:] = [own.get(name, name) for name in node.output]
        split = onnx.helper.make_node("Split", [FORCED], differences, axis=0, num_outputs=len(differences))
        graph.node.insert(0, split)
        graph.input.append(_float_info(FORCED))
    graph.node.append(onnx.helper.make_node("Concat", made, [DIFFERENCES], axis=0))
    graph.output.append(_float_info(DIFFERENCES))


def _float_info(name: str) -> onnx.ValueInfoProto:
    sizes = ["units * batch_size", "sequence_length"]
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)


def add_first_token(graph: Any) -> None:
    """Let the head read a part of the tokens: one more input, `FIRST`, int64 [1], is the first of them.

    A text is continued from the logits of its last token, and the head of a large vocabulary is a good part of a
    model's work. Where the head is of another form than export writes, its logits are cut instead.
    """
    states = _states(graph)
    maker = next((index for index, node in enumerate(graph.node) if states in node.output), None)
    if maker is None:
        return  # no model of ours, which the session will say
    whole, cut = ("logits.whole", states) if states == "logits" else (states, f"{states}.from_first")
    for node in graph.node:
        node.output[:] = [whole if name == states else name for name in node.output]
        node.input[:] = [cut if name == states else name for name in node.input]
    numbers = {f"{FIRST}.end": np.iinfo(np.int64).max, f"{FIRST}.axis": 1}
    graph.initializer.extend(onnx.numpy_helper.from_array(np.array([n]), name) for name, n in numbers.items())
    graph.input.append(onnx.helper.make_tensor_value_info(FIRST, onnx.TensorProto.INT64, [1]))
    graph.node.insert(maker + 1, onnx.helper.make_node("Slice", [whole, FIRST, *numbers], [cut]))
    del graph.value_info[:]  # some say that all tokens are there
    for output in graph.output:
        if output.name == "logits" and len(output.type.tensor_type.shape.dim) == 3:
            output.type.tensor_type.shape.dim[1].dim_param = "logit_tokens"


def _states(graph: Any) -> str:
    """Return what the head reads, [batch, tokens, d], or `logits` where what is between is of a form not known.

    Known is one product with a constant weight, of all tokens as rows of a matrix (Gemm) or not, and, behind it, what
    treats every number by itself and reads constants.
    """
    makers = {output: node for node in graph.node for output in node.output}
    readers = [name for node in graph.node for name in node.input] + [value.name for value in graph.output]
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # in the order in which they run
        if node.op_type == "Constant" or (node.op_type in _OF_WEIGHTS and constants.issuperset(node.input)):
            constants.update(node.output)
    name = "logits"
    while name in makers:
        node = makers[name]
        made = [given for given in node.input if given not in constants]
        if node.op_type == "Reshape" and readers.count(name) == 1:
            return _flattened(node, makers, constants, readers) or "logits"
        if node.op_type not in {_PRODUCT, *_EACH_NUMBER} or len(made) != 1 or readers.count(name) != 1:
            break
        if node.op_type == _PRODUCT:
            alone = made[0] == node.input[0] and made[0] in makers and readers.count(made[0]) == 1
            return made[0] if alone else "logits"
        name = made[0]
    return "logits"


def _flattened(back: Any, makers: dict[str, Any], constants: set[str], readers: list[str]) -> str | None:
    """Return what Reshape, Gemm with constants, Reshape to the size that it had before begin with, if they are that."""
    product, size = makers.get(back.input[0]), makers.get(back.input[1])
    if product is None or size is None or product.op_type != "Gemm" or not constants.issuperset(product.input[1:]):
        return None
    flat = makers.get(product.input[0])
    if flat is None or flat.op_type != "Reshape" or flat.input[1] not in constants or size.op_type != "Concat":
        return None
    states = flat.input[0]
    asks = [makers.get(given) for given in size.input if given not in constants]
    known = all(ask is not None and ask.op_type == "Shape" and list(ask.input) == [states] for ask in asks)
    alone = (
        readers.count(states) == 1 + len(asks) and readers.count(back.input[0]) == readers.count(product.input[0]) == 1
    )
    return states if asks and known and alone and states in makers else None
