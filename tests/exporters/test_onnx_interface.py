"""What export adds to the standard inputs and outputs: first token with logits, logit differences, forced routes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from exporters.onnx_format import DIFFERENCES, FIRST, FORCED, IN_PLACE, UNITS, Decision
from exporters.onnx_interface import complete_interface, force_decisions


def _completed(model: Any, decisions: tuple[Decision, ...] = ()) -> Any:
    changed = ir.serde.deserialize_model(model)
    complete_interface(changed, decisions, layers=1)
    return ir.serde.serialize_model(changed)


def _model(nodes: list[Any], outputs: tuple[str, ...] = ("logits",)) -> Any:
    """A model of x [batch, tokens, 4], weights [4, 6] and a scalar."""
    draw = np.random.default_rng(0)
    constants = {"w": draw.standard_normal((4, 6)), "v": draw.standard_normal((6, 4)), "cap": np.array(3.0)}
    weights = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    sizes = {"rows": [-1, 4], "last": [6], "to": [2, -1, 6]}
    weights += [onnx.numpy_helper.from_array(np.array(size), name) for name, size in sizes.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", 4])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", None]) for name in outputs]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["h"]), *nodes], "head", [x], values, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def _chain(*nodes: tuple[str, ...]) -> list[Any]:
    """Nodes as (operator, inputs ..., output)."""
    return [helper.make_node(op, inputs, [output]) for op, *inputs, output in nodes]


def _flat() -> list[Any]:
    return _chain(("Reshape", "h", "rows", "flat"), ("MatMul", "flat", "w", "a"), ("Reshape", "a", "to", "logits"))


def _gemm(size: str) -> list[Any]:
    """A product of all tokens as rows of a matrix, brought back to the size of a value."""
    return [
        *_chain(("Reshape", "h", "rows", "flat")),
        helper.make_node("Gemm", ["flat", "v"], ["product"], transB=1),
        helper.make_node("Shape", [size], ["lead"], end=-1),
        helper.make_node("Concat", ["lead", "last"], ["size"], axis=0),
        *_chain(("Reshape", "product", "size", "logits")),
    ]


@pytest.mark.parametrize(
    ("nodes", "cut"),
    [
        (_chain(("MatMul", "h", "w", "logits")), "h"),
        (_chain(("MatMul", "h", "w", "a"), ("Tanh", "a", "b"), ("Mul", "cap", "b", "logits")), "h"),
        (_chain(("MatMul", "h", "w", "a"), ("Transpose", "cap", "c"), ("Div", "a", "c", "logits")), "h"),
        (_gemm("h"), "h"),
        # Of all tokens: an operator that is not known behind the head, or another reader of what the head reads.
        (_flat(), "logits.whole"),
        (_gemm("x"), "logits.whole"),
        (_chain(("MatMul", "h", "w", "a"), ("MatMul", "x", "w", "b"), ("Add", "a", "b", "logits")), "logits.whole"),
        (_chain(("MatMul", "x", "w", "logits")), "logits.whole"),
        (_chain(("MatMul", "h", "w", "a"), ("Softmax", "a", "logits")), "logits.whole"),
        (_chain(("MatMul", "h", "w", "logits"), ("Neg", "h", "other")), "logits.whole"),
        (_chain(("MatMul", "h", "w", "logits"), ("Tanh", "h", "other")), "logits.whole"),
    ],
)  # fmt: skip
def test_where_the_tokens_are_cut(nodes: list[Any], cut: str) -> None:
    """Before the head where nothing else depends on it; else its logits are."""
    others = tuple(node.output[0] for node in nodes if node.output[0] == "other" and node.op_type == "Tanh")
    plain = _model(nodes, ("logits", *others))
    cutting = _completed(plain)
    onnx.checker.check_model(cutting)
    (piece,) = [node for node in cutting.graph.node if node.op_type == "Slice"]
    assert piece.input[0] == cut
    x = np.random.default_rng(1).standard_normal((2, 5, 4)).astype(np.float32)
    whole, *_ = ort.InferenceSession(plain.SerializeToString()).run(None, {"x": x})
    session = ort.InferenceSession(cutting.SerializeToString())
    for first in (0, 3):
        found, *rest = session.run(None, {"x": x, FIRST: np.array([first])})
        np.testing.assert_allclose(found, whole[:, first:], atol=1e-6)
        assert all(other.shape == (2, 5, 4) for other in rest)


def _routed() -> Any:
    """Two decisions about x, which add to it where they are not below 0."""
    nodes = []
    for unit in ("a", "b"):
        nodes += _chain(
            ("MatMul", "h", f"r{unit}", f"{unit}.wide"),
            ("Squeeze", f"{unit}.wide", "axis", f"{unit}.logit_difference"),
            ("Less", f"{unit}.logit_difference", "zero", f"{unit}.skip"),
            ("Unsqueeze", f"{unit}.skip", "axis", f"{unit}.skip3"),
            ("Where", f"{unit}.skip3", "zero", f"add{unit}", f"{unit}.added"),
        )
    nodes += _chain(("Add", "a.added", "b.added", "sum"), ("Add", "h", "sum", "y"), ("MatMul", "y", "w", "logits"))
    model = _model(nodes)
    draw = np.random.default_rng(2)
    added = {"ra": draw.standard_normal((4, 1)), "rb": draw.standard_normal((4, 1)), "zero": np.array(0.0)}
    added |= {"adda": np.array(1.0), "addb": np.array(10.0)}
    tensors = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in added.items()]
    tensors.append(onnx.numpy_helper.from_array(np.array([2]), "axis"))
    model.graph.initializer.extend(tensors)
    return model


DECISIONS = (Decision.of("a"), Decision.of("b"))
X = np.random.default_rng(3).standard_normal((2, 5, 4)).astype(np.float32)


def test_differences_are_an_output_and_the_metadata_names_the_units() -> None:
    model = _completed(_routed(), DECISIONS)
    onnx.checker.check_model(model)
    assert [value.name for value in model.graph.output] == ["logits", DIFFERENCES]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata[UNITS]) == [["a", "a.logit_difference"], ["b", "b.logit_difference"]]
    assert metadata[IN_PLACE] == "false"
    session = ort.InferenceSession(model.SerializeToString())
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert [value.name for value in session.get_overridable_initializers()] == [FIRST]
    logits, differences = session.run(None, {"x": X})
    (expected,) = ort.InferenceSession(_routed().SerializeToString()).run(None, {"x": X})
    np.testing.assert_array_equal(logits, expected)
    assert differences.shape == (4, 5)
    assert 0 < (differences < 0).mean() < 1


def test_forced_decisions_take_the_place_of_the_routers_which_report_their_own() -> None:
    model = _completed(_routed(), DECISIONS)
    free = ort.InferenceSession(model.SerializeToString())
    logits, own = free.run(None, {"x": X})
    changed = ir.serde.deserialize_model(model)
    force_decisions(changed, DECISIONS)
    forcing = ir.serde.serialize_model(changed)
    onnx.checker.check_model(forcing)
    session = ort.InferenceSession(forcing.SerializeToString())
    told = np.where(own < 0, np.float32(-1), np.float32(1))
    for sign in (1, -1):
        found, differences = session.run(None, {"x": X, FORCED: sign * told})
        np.testing.assert_array_equal(differences, own)
        assert np.array_equal(found, logits) == (sign == 1)


def test_a_decision_without_its_value_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"c\.logit_difference"):
        _completed(_routed(), (*DECISIONS, Decision.of("c")))
