from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from passes.base import PassManager
from passes.clean_up import CleanUp

ASSERT = torch.ops.aten._assert_tensor_metadata.default


def _double_with_assertion() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(ASSERT, (x,), {"dtype": torch.float32, "device": torch.device("meta")})
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0)))
    return fx.GraphModule(nn.Module(), graph)


def _nested() -> fx.GraphModule:
    """A model that calls two doubling modules, and asserts between them."""
    root = nn.Module()
    root.first, root.second = _double_with_assertion(), _double_with_assertion()
    graph = fx.Graph()
    x = graph.placeholder("x")
    middle = graph.call_module("first", (x,))
    graph.call_function(ASSERT, (middle,), {"dtype": torch.float16})
    graph.output(graph.call_module("second", (middle,)))
    return fx.GraphModule(root, graph)


def test_removes_assertions_from_every_graph_and_keeps_the_numbers(calls: Callable) -> None:
    model = _nested()
    assert calls(model)["_assert_tensor_metadata"] == 3
    assert PassManager([CleanUp()]).run(model).modified
    assert calls(model)["_assert_tensor_metadata"] == 0
    assert calls(model)["mul"] == 2
    # The assertions of the capture (device meta, dtype fp16) would have failed here.
    torch.testing.assert_close(model(torch.ones(3)), torch.full((3,), 4.0), rtol=0, atol=0)


def test_second_run_changes_nothing() -> None:
    model = _nested()
    PassManager([CleanUp()]).run(model)
    assert not PassManager([CleanUp()]).run(model).modified


def test_captured_models_hold_no_assertions(tiny: Callable, calls: Callable) -> None:
    assert calls(tiny().graph)["_assert_tensor_metadata"] == 0


def test_removes_dropouts_of_eval_mode_alone() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    idle = graph.call_function(torch.ops.aten.dropout.default, (x, 0.5, False))
    graph.output(graph.call_function(torch.ops.aten.dropout.default, (idle, 0.5, True)))
    model = fx.GraphModule(nn.Module(), graph)
    assert PassManager([CleanUp()]).run(model).modified
    (left,) = (node for node in model.graph.nodes if node.op == "call_function")
    assert left.args == (x, 0.5, True)
    assert not PassManager([CleanUp()]).run(model).modified
