"""Operators that add to a base reuse its memory: shapes are inferred where known, and other values do not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from exporters.onnx_ops import DOMAIN, VERSION, function_protos
from irc.runtime.native import installed_library
from passes import dialect  # noqa: F401 - registers the operators

LIBRARY = installed_library()
WIDTH = 8
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def _session(nodes: list[Any], base: list[Any] | None, outputs: list[str]) -> Any:
    if LIBRARY is None:
        pytest.skip("the native operator library is not installed")
    given = [
        helper.make_tensor_value_info("base", FLOAT, base),
        helper.make_tensor_value_info("rows", INT64, [1, "count", 2]),
        helper.make_tensor_value_info("y", FLOAT, [1, "count", WIDTH]),
    ]
    made = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "memory", given, made)
    sets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)]
    bodies = function_protos({"Scatter", "ScatterAdd"})
    model = helper.make_model(graph, opset_imports=sets, ir_version=10, functions=bodies)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY.path))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _scatter(operator: str, base: str, z: str) -> Any:
    return helper.make_node(operator, ["y", "rows", base], [z], domain=DOMAIN)


@pytest.mark.parametrize("operator", ["Scatter", "ScatterAdd"])
def test_the_base_s_shape_is_the_output_s(operator: str) -> None:
    session = _session([_scatter(operator, "base", "z")], ["batch", "tokens", WIDTH], ["z"])
    assert session.get_outputs()[0].shape == ["batch", "tokens", WIDTH]


@pytest.mark.parametrize("base", [None, ["batch", None, WIDTH]], ids=["no rank", "a size without a name"])
def test_what_is_not_known_of_the_base_is_not_claimed(base: list[Any] | None) -> None:
    session = _session([_scatter("ScatterAdd", "base", "z")], base, ["z"])
    assert session.get_outputs()[0].shape in (None, [])
    y, rows = np.ones((1, 1, WIDTH), np.float32), np.array([[[0, 2]]])
    (z,) = session.run(None, {"base": np.zeros((1, 3, WIDTH), np.float32), "rows": rows, "y": y})
    assert z[0, :, 0].tolist() == [0, 0, 1]


def test_a_base_that_others_read_keeps_its_numbers() -> None:
    nodes = [
        helper.make_node("Neg", ["base"], ["h"]),
        _scatter("ScatterAdd", "h", "one"),
        _scatter("ScatterAdd", "one", "two"),
        helper.make_node("Neg", ["two"], ["z"]),
        helper.make_node("Exp", ["h"], ["early"]),
        helper.make_node("Exp", ["one"], ["middle"]),
    ]
    session = _session(nodes, ["batch", "tokens", WIDTH], ["z", "early", "middle"])
    base, y = torch.randn(2, 5, WIDTH), torch.randn(1, 3, WIDTH)
    rows = torch.tensor([[[0, 1], [1, 0], [1, 4]]])
    found = session.run(None, {"base": base.numpy(), "rows": rows.numpy(), "y": y.numpy()})
    one = torch.ops.irc.scatter_add(y, rows, -base)
    two = torch.ops.irc.scatter_add(y, rows, one)
    for value, expected in zip(found, (-two, (-base).exp(), one.exp()), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), expected)
