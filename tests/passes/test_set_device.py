from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn
from transformers import LlamaConfig

from irc.model.capture import capture
from passes.base import PassManager
from passes.printer import print_model
from passes.set_device import SetDevice

META = torch.device("meta")


def _inner() -> fx.GraphModule:
    """Device in an argument by position (second operator too) and by keyword."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.ops.aten.to.device, (x, META, torch.float32))
    second = graph.call_function(torch.ops.aten.to.device, (first, META, torch.float64))
    made = graph.call_function(torch.ops.aten.ones.default, ([3],), {"device": META, "dtype": torch.float64})
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (second, made)))
    return fx.GraphModule(nn.Module(), graph)


def _model() -> fx.GraphModule:
    root = nn.Module()
    root.inner = _inner()
    graph = fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    return fx.GraphModule(root, graph)


def test_rewrites_every_device_of_every_graph() -> None:
    model = _model()
    assert print_model(model).count("meta") == 3
    assert PassManager([SetDevice("cpu")]).run(model).modified
    assert print_model(model).count("meta") == 0
    assert print_model(model).count("cpu") == 3
    torch.testing.assert_close(model(torch.ones(3)), torch.full((3,), 2.0, dtype=torch.float64), rtol=0, atol=0)


def test_second_run_changes_nothing() -> None:
    model = _model()
    PassManager([SetDevice("cpu")]).run(model)
    text = print_model(model)
    assert not PassManager([SetDevice(torch.device("cpu"))]).run(model).modified
    assert print_model(model) == text


def test_another_device_changes_it_again() -> None:
    model = _model()
    PassManager([SetDevice("cpu")]).run(model)
    assert PassManager([SetDevice("cuda:1")]).run(model).modified
    assert print_model(model).count("cuda:1") == 3


def test_captured_model_leaves_the_meta_device() -> None:
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    graph = capture(config, torch.float32).graph
    assert "meta" in print_model(graph)
    PassManager([SetDevice("cpu")]).run(graph)
    assert "meta" not in print_model(graph)


def test_assigned_models_are_on_their_device(tiny: Callable) -> None:
    assert "meta" not in print_model(tiny().graph)
