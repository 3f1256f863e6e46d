"""What the runtime adds to a model in memory; its file stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from exporters.onnx import Decision

FORCED, DIFFERENCES, FIRST = "irc.forced_differences", "irc.logit_differences", "irc.first_token"
_PRODUCTS = ("MatMul", "Gemm")
_EACH_TOKEN = {*_PRODUCTS, "Add", "Cast", "Div", "Mul", "Reshape", "Tanh"}
_SIZES = {"Concat", "Shape"}  # the size that a product is brought back to


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
    behind = _behind(graph, states) or {states}
    whole, cut = ("logits.whole", states) if states == "logits" else (states, f"{states}.from_first")
    for node in graph.node:
        node.output[:] = [whole if name == states else name for name in node.output]
        node.input[:] = [cut if name == states else name for name in node.input]
    numbers = {f"{FIRST}.end": np.iinfo(np.int64).max, f"{FIRST}.axis": 1}
    graph.initializer.extend(onnx.numpy_helper.from_array(np.array([n]), name) for name, n in numbers.items())
    graph.input.append(onnx.helper.make_tensor_value_info(FIRST, onnx.TensorProto.INT64, [1]))
    graph.node.insert(maker + 1, onnx.helper.make_node("Slice", [whole, FIRST, *numbers], [cut]))
    for value in [value for value in graph.value_info if value.name in behind]:
        graph.value_info.remove(value)  # it says that all tokens are there
    for output in graph.output:
        if output.name == "logits" and len(output.type.tensor_type.shape.dim) == 3:
            output.type.tensor_type.shape.dim[1].dim_param = "logit_tokens"


def _states(graph: Any) -> str:
    """Return what the head reads, [batch, tokens, d], or `logits` where what is between is of a form not known."""
    makers = {output: node for node in graph.node for output in node.output if node.op_type != "Constant"}
    name, product = "logits", False
    while name in makers and makers[name].op_type in _EACH_TOKEN and not product:
        node = makers[name]
        made = [given for given in node.input if given in makers]
        if node.op_type == "Reshape":
            made = made[:1]  # to what size is another matter
        if len(made) != 1 or (made[0] != node.input[0] and node.op_type in (*_PRODUCTS, "Reshape")):
            break
        name, product = made[0], node.op_type in _PRODUCTS
        if node.op_type == "Gemm" and makers[name].op_type == "Reshape":
            name = makers[name].input[0]  # all tokens as rows of a matrix
    outputs = {value.name for value in graph.output}
    behind = _behind(graph, name)
    return name if product and behind is not None and behind & outputs == {"logits"} else "logits"


def _behind(graph: Any, name: str) -> set[str] | None:
    """Return the names of all that comes of a value, None where some of it may not be each token's own."""
    found = {name}
    for node in graph.node:
        if found.intersection(node.input) or any(attribute.HasField("g") for attribute in node.attribute):
            if node.op_type not in _EACH_TOKEN | _SIZES:
                return None
            found.update(node.output)
    return found
