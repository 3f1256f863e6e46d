"""A text is continued from its last token's logits: no others are computed, and they are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from irc.runtime.additions import FIRST, add_first_token
from irc.runtime.generation import Generator
from irc.runtime.session import Runtime, Step


@pytest.mark.parametrize("ops", ["auto", "portable"])
def test_the_last_tokens_logits_are_those_among_all(exported: Path, dense: Path, ops: str) -> None:
    """With a prompt, a step and a few tokens more; the cache does not depend on it."""
    for folder in (exported, dense):
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        add_first_token(graph)
        assert not any("logits.whole" in node.output for node in graph.node), "the head of what is exported is known"
        runtime = Runtime(folder, "cpu", ops=ops)
        caches, past = (runtime.empty_cache(2), runtime.empty_cache(2)), 0
        for tokens in (9, 1, 4):
            ids, past = np.arange(2 * tokens).reshape(2, tokens) % 61, past + tokens
            mask = np.ones((2, past), np.int64)
            whole, last = (runtime.step(ids, mask, caches[part], last=bool(part)) for part in (0, 1))
            assert whole.logits.shape[:2] == (2, tokens)
            assert last.logits.shape == (2, 1, whole.logits.shape[2])
            np.testing.assert_allclose(last.logits[:, 0], whole.logits[:, -1], atol=1e-5)
            np.testing.assert_array_equal(last.execute, whole.execute)


def test_a_generator_asks_for_the_last_tokens_logits_alone(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, ...]] = []
    original: Callable[..., Step] = Runtime.step

    def step(*arguments: Any, **named: Any) -> Step:
        made = original(*arguments, **named)
        found.append(made.logits.shape[:2])
        return made

    monkeypatch.setattr(Runtime, "step", step)
    Generator(Runtime(exported)).continue_ids(list(range(10)), 3)
    assert set(found) == {(1, 1)}


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
    plain, cutting = (_model(nodes, ("logits", *others)) for _ in "12")
    add_first_token(cutting.graph)
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
