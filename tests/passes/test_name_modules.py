"""NameModules: every node of a lowered model says which module it belongs to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from exporters.onnx import lowering
from passes.base import PassManager, graph_of
from passes.name_modules import MODULE, PART, NameModules
from passes.printer import print_model

irc = torch.ops.irc


def _modules(model: nn.Module, *targets: object) -> list[str]:
    graphs = [graph for module in model.modules() if (graph := graph_of(module)) is not None]
    return [node.meta["custom"][MODULE] for graph in graphs for node in graph.nodes if node.target in targets]


def test_operators_carry_the_modules_whose_work_they_do(tiny: Callable, insertions: tuple) -> None:
    graph = tiny("qwen3").graph
    PassManager([*insertions, *lowering("cuda")]).run(graph)
    layers = [f"model.layers.{layer}" for layer in range(2)]
    units = [f"{layer}.{unit}" for layer in layers for unit in ("self_attn", "mlp")]
    assert _modules(graph, irc.router.default) == [f"{unit}_router" for unit in units]
    assert _modules(graph, irc.forecast_add.default) == [f"{unit}_forecaster" for unit in units]
    assert _modules(graph, irc.decide_rows.default, irc.scatter_add.default) == [
        u for unit in units for u in [unit] * 2
    ]
    norms = ["model.norm", *(f"{layer}.{name}" for layer in layers for name in ("input", "post_attention"))]
    heads = [f"{layer}.self_attn.{name}_norm" for layer in layers for name in ("q", "k")]
    found = [name.removesuffix("_layernorm") for name in _modules(graph, irc.rms_norm.default)]
    assert sorted(found) == sorted([*norms, *heads])
    products = [
        f"{layer}.{name}" for layer in layers for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    ]
    assert sorted(_modules(graph, irc.routed_matmul.default)) == sorted(products)
    assert _modules(graph, irc.routed_gate.default) == [f"{layer}.mlp" for layer in layers]


def test_calls_carry_the_module_that_they_call(tiny: Callable) -> None:
    graph = tiny().graph
    assert NameModules().call(graph).modified
    assert _modules(graph, "k_proj") == [f"model.layers.{layer}.self_attn.k_proj" for layer in range(2)]
    assert _modules(graph, "lm_head") == ["lm_head"]
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert {node.meta["custom"][MODULE] for node in placeholders} == {""}


def test_numbers_of_calls_are_left_out_and_other_notes_stay() -> None:
    inside = fx.Graph()
    inside.output(inside.call_function(torch.neg, (inside.placeholder("x"),)))
    inner = fx.GraphModule(nn.Module(), inside)
    outer = fx.Graph()
    call = outer.call_module("act@1", (outer.placeholder("x"),))
    product = outer.call_function(torch.mul, (call, call))
    product.meta |= {PART: "norm", "custom": {"note": 1}}
    outer.output(product)
    model = fx.GraphModule(nn.ModuleDict({"act@1": inner}), outer)
    NameModules().call(model)
    assert _modules(model, torch.neg, "act@1") == ["act", "act"]
    product = next(node for node in model.graph.nodes if node.target is torch.mul)
    assert product.meta["custom"] == {"note": 1, MODULE: "norm"}


def test_second_run_changes_nothing(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager([*insertions, *lowering()]).run(graph)
    text = print_model(graph)
    assert not NameModules().call(graph).modified
    assert print_model(graph) == text
