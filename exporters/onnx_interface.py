"""What a model offers beside the standard names: logit differences, the first token with logits, forced routes.

All of it works on a model in memory, just made or loaded from a file; weights in external data are not read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

import numpy as np
import onnx_ir as ir

from exporters.onnx_format import DIFFERENCES, FIRST, FORCED, IN_PLACE, UNITS, Decision

_PRODUCT = "MatMul"
_ELEMENTWISE = ("Add", "Cast", "Div", "Mul", "Tanh")
_OF_WEIGHTS = ("Cast", "Transpose")
_DIFFERENCES_SIZE = ("units * batch_size", "sequence_length")
_LOGIT_TOKENS = "logit_tokens"
_CUT = "/lm_head/first_token/Slice"


def complete_interface(model: ir.Model, decisions: Sequence[Decision], layers: int) -> None:
    """Add the output `DIFFERENCES`, the optional input `FIRST`, and the metadata that the runtime checks.

    Args:
        model: With its inputs and outputs named.
        decisions: Of its routed units, in the order of the rows of `DIFFERENCES`; empty for a dense model.
        layers: Decoder layers.

    Raises:
        ValueError: The model lacks the value of a decision.
    """
    _add_differences(model.graph, decisions)
    _add_first_token(model.graph)
    attentions = sum(node.op_type == "RoutedAttention" for node in model.graph)
    model.metadata_props[UNITS] = json.dumps([[decision.unit, decision.difference] for decision in decisions])
    model.metadata_props[IN_PLACE] = json.dumps(attentions == layers)


def force_decisions(model: ir.Model, decisions: Sequence[Decision]) -> None:
    """Add the input `FORCED`, which decides in place of the routers; these still run, for `DIFFERENCES` reads them.

    Args:
        model: A complete one (see `complete_interface`) with at least one routed unit.
        decisions: Of its routed units.
    """
    graph = model.graph
    (reported,) = (value.producer() for value in graph.outputs if value.name == DIFFERENCES)
    forced = ir.Value(name=FORCED, shape=ir.Shape(_DIFFERENCES_SIZE), type=ir.TensorType(ir.DataType.FLOAT))
    split = ir.node("Split", [forced], {"axis": 0, "num_outputs": len(decisions)}, num_outputs=len(decisions))
    split.name = "/model/forced_differences/Split"
    for own, told in zip(_differences(graph, decisions), split.outputs, strict=True):
        told.name = f"{own.name}.forced"
        for node, index in list(own.uses()):
            if node is not reported:
                node.replace_input_with(index, told)
    graph.inputs.append(forced)
    graph.insert_before(graph[0], split)


def _differences(graph: ir.Graph, decisions: Sequence[Decision]) -> list[ir.Value]:
    made = {value.name: value for node in graph for value in node.outputs}
    for decision in decisions:
        if decision.difference not in made:
            raise ValueError(f"unit {decision.unit}: the model has no value {decision.difference}")
    return [made[decision.difference] for decision in decisions]


def _add_differences(graph: ir.Graph, decisions: Sequence[Decision]) -> None:
    if not decisions:
        return
    concat = ir.node("Concat", _differences(graph, decisions), {"axis": 0}, name="/model/logit_differences/Concat")
    (output,) = concat.outputs
    output.name, output.shape = DIFFERENCES, ir.Shape(_DIFFERENCES_SIZE)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(concat)
    graph.outputs.append(output)


def _add_first_token(graph: ir.Graph) -> None:
    """Let the head read only some of the tokens: `FIRST` is the first of them.

    A text is continued from the logits of its last token, and the head of a large vocabulary is a good part of a
    model's work. Where the head does not have a form that is known here, its logits are cut instead.
    """
    index = next(index for index, value in enumerate(graph.outputs) if value.name == "logits")
    logits = graph.outputs[index]
    states = _head_input(logits)
    maker = states.producer()
    assert maker is not None
    end, axis = (_initializer(graph, number) for number in (np.iinfo(np.int64).max, 1))
    first = _initializer(graph, 0, FIRST)
    cut = ir.Value(name=f"{_CUT}_output_0", type=states.type, shape=_cut_shape(states.shape))
    whole = logits.shape
    if states is logits:
        logits.name, cut.name = f"{maker.name}_output_0" if maker.name else "logits.whole", "logits"
        graph.outputs[index] = cut
    states.replace_all_uses_with(cut)
    piece = ir.node("Slice", [states, first, end, axis], outputs=[cut], name=_CUT)
    graph.inputs.append(first)
    graph.insert_after(maker, piece)
    _forget_sizes(cut)
    graph.outputs[index].shape = _cut_shape(whole)


def _initializer(graph: ir.Graph, number: int, name: str = "") -> ir.Value:
    """Return an initializer int64 [1]; without a name it is called, and shared, as export does with constants."""
    name = name or f"/constants/int64/[{number}]"
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor([number], dtype=ir.DataType.INT64, name=name)
    value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _cut_shape(whole: ir.Shape | None) -> ir.Shape | None:
    """Return the shape of what is left of [batch, tokens, features] when only some tokens are kept."""
    return None if whole is None or len(whole) != 3 else ir.Shape([whole[0], _LOGIT_TOKENS, whole[2]])


def _forget_sizes(value: ir.Value) -> None:
    """Forget the sizes of what is made from a value: they say that all tokens are there."""
    waiting = [value]
    while waiting:
        for node in {node for node, _ in waiting.pop().uses()}:
            for output in node.outputs:
                output.shape = None
                waiting.append(output)


def _head_input(logits: ir.Value) -> ir.Value:
    """Return what the head reads, [batch, tokens, d], or the logits where the form of the head is not known.

    A head is known if it is one product with a constant weight (of all tokens as rows of a matrix, Gemm, or not)
    and, behind it, operators that treat every number alone and read constants.
    """
    value = logits
    while (node := value.producer()) is not None:
        made = [given for given in node.inputs if given is not None and not _is_constant(given)]
        if node.op_type == "Reshape" and _readers(value) == 1:
            return _flattened(node) or logits
        if node.op_type not in {_PRODUCT, *_ELEMENTWISE} or len(made) != 1 or _readers(value) != 1:
            break
        (value,) = made
        if node.op_type == _PRODUCT:
            alone = value is node.inputs[0] and value.producer() is not None and _readers(value) == 1
            return value if alone else logits
    return logits


def _flattened(back: ir.Node) -> ir.Value | None:
    """Return what Reshape, Gemm with constants, Reshape to the size of before begin with; None for anything else."""
    product, size = (_producer(back.inputs[index]) for index in (0, 1))
    if product is None or size is None or product.op_type != "Gemm" or size.op_type != "Concat":
        return None
    flat = _producer(product.inputs[0])
    if flat is None or flat.op_type != "Reshape" or not all(_is_constant(given) for given in product.inputs[1:]):
        return None
    states = cast(ir.Value, flat.inputs[0])
    asks = [_producer(given) for given in size.inputs if not _is_constant(given)]
    known = all(ask is not None and ask.op_type == "Shape" and list(ask.inputs) == [states] for ask in asks)
    alone = (
        _readers(states) == 1 + len(asks)
        and _readers(cast(ir.Value, back.inputs[0])) == _readers(cast(ir.Value, product.inputs[0])) == 1
    )
    cuttable = states.producer() is not None and _is_constant(flat.inputs[1])
    return states if asks and known and alone and cuttable else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _readers(value: ir.Value) -> int:
    return len(value.uses()) + value.is_graph_output()


def _is_constant(value: ir.Value | None) -> bool:
    if value is None or value.is_initializer():
        return value is None or not value.is_graph_input()
    node = value.producer()
    if node is None:
        return False
    return node.op_type == "Constant" or (node.op_type in _OF_WEIGHTS and all(map(_is_constant, node.inputs)))
