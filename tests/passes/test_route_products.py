"""RouteProducts and FuseGates: numbers stay, linears on padded rows are routed, the rest stays as it is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from exporters.onnx import lowering
from irc.model.experts import Experts
from irc.model.modules import StoredKeys
from passes import route_products
from passes.base import PassManager, finish, graph_of
from passes.fuse_gates import FuseGates
from passes.mask_skipped_keys import MaskSkippedKeys
from passes.printer import print_graph, print_model
from passes.route_experts import RouteExperts
from passes.route_products import RouteProducts

irc = torch.ops.irc


def _nodes(model: nn.Module, target: object) -> list[fx.Node]:
    graphs = [graph for module in model.modules() if (graph := graph_of(module)) is not None]
    return [node for graph in graphs for node in graph.nodes if node.target == target]


@pytest.mark.parametrize("family", ["llama", "llama-mha-biased-rope3", "qwen3", "mistral-sliding"])
@torch.no_grad()
def test_numbers_stay_and_all_linears_of_units_are_routed(tiny: Callable, insertions: tuple, family: str) -> None:
    model = tiny(family)
    PassManager([*insertions, *lowering()]).run(model.graph)
    ids = model.ids(3, 9)
    before = model.run(ids)
    assert PassManager([RouteProducts(40)]).run(model.graph).modified
    layers = model.config.num_hidden_layers
    assert [node.args[1:] for node in _nodes(model.graph, irc.decide_rows.default)] == [(40,)] * 2 * layers
    assert len(_nodes(model.graph, irc.routed_matmul.default)) == 5 * layers  # gate, up, down; q, o
    for one, other in zip(before, model.run(ids), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_unit_whose_rows_go_where_padding_is_unknown_is_left_alone(
    tiny: Callable, insertions: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = route_products._TAKE_PADDED_ROWS - {irc.routed_attention.default}
    monkeypatch.setattr(route_products, "_TAKE_PADDED_ROWS", known)
    model = tiny("llama")
    PassManager([*insertions, *lowering(), RouteProducts()]).run(model.graph)
    padded = [len(node.args) == 2 for node in _nodes(model.graph, irc.decide_rows.default)]
    assert padded == [False, True] * 2
    assert len(_nodes(model.graph, irc.routed_matmul.default)) == 3 * 2


def test_reduced_attention_is_left_alone(tiny: Callable, insertions: tuple, control: object) -> None:
    model = tiny("llama")
    names = frozenset({"model.layers.1.self_attn"})
    masks = MaskSkippedKeys(names, lambda unit: StoredKeys(unit.name, control))
    PassManager([*insertions, masks, *lowering("cuda")]).run(model.graph)
    assert [len(node.args) == 2 for node in _nodes(model.graph, irc.decide_rows.default)] == [True, True, False, True]


@torch.no_grad()
def test_rows_of_experts_are_padded(captured_module: Callable) -> None:
    mixture, x = Experts(16, 24, 5, 2, True, "silu"), torch.randn(2, 7, 16)
    model = captured_module(mixture, x)
    expected = mixture(x)
    PassManager([RouteExperts(), RouteProducts()]).run(model)
    assert len(_nodes(model, irc.routed_matmul.default)) == 5 * 3
    found = model(x)
    torch.testing.assert_close(found[0] if isinstance(found, (list, tuple)) else found, expected, rtol=0, atol=1e-6)


def test_a_choice_of_experts_among_rows_is_not_made_for_rows_that_are_nothing(captured_module: Callable) -> None:
    model = captured_module(Experts(16, 24, 5, 2, True, "silu"), torch.randn(2, 7, 16))
    PassManager([RouteExperts()]).run(model)
    x = next(node for node in model.graph.nodes if node.op == "placeholder")
    with model.graph.inserting_after(x):
        mask = model.graph.call_function(torch.ops.aten.any.dim, (x, -1))
    with model.graph.inserting_after(mask):
        outer = model.graph.call_function(irc.select_rows.default, (mask,))
    with model.graph.inserting_after(outer):
        rows = model.graph.call_function(operator.getitem, (outer, 0))
    with model.graph.inserting_after(rows):
        compacted = model.graph.call_function(irc.compact.default, (x, rows))
    x.replace_all_uses_with(compacted, lambda user: user not in (mask, compacted))
    finish(model)
    PassManager([RouteProducts()]).run(model)
    choices = _nodes(model, irc.select_rows.default)
    assert [len(node.args) for node in choices] == [1] + [2] * 5
    assert {node.args[1] for node in _nodes(model, irc.routed_matmul.default)}.isdisjoint({rows})


def test_golden_layer(tiny: Callable, insertions: tuple, golden: Callable[[str], str]) -> None:
    graph = tiny().graph
    PassManager([*insertions, *lowering("cuda")]).run(graph)
    texts = [print_graph(graph.get_submodule(f"model.layers.1{part}").graph) for part in ("", ".mlp", ".self_attn")]
    assert "\n\n".join(texts) + "\n" == golden("layer_with_routed_products")


@pytest.mark.parametrize("family", ["llama", "llama-mha-biased-rope3"])
@torch.no_grad()
def test_gates_are_fused_where_they_have_no_bias(tiny: Callable, insertions: tuple, family: str) -> None:
    model = tiny(family)
    PassManager([*insertions, *lowering(), RouteProducts()]).run(model.graph)
    ids = model.ids(3, 9)
    before = model.run(ids)
    assert PassManager([FuseGates()]).run(model.graph).modified == (family == "llama")
    counts = [len(_nodes(model.graph, target.default)) for target in (irc.routed_gate, irc.routed_matmul)]
    assert counts == ([2, 6] if family == "llama" else [0, 5])
    for one, other in zip(before, model.run(ids), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_product_with_another_reader_is_not_fused(tiny: Callable, insertions: tuple) -> None:
    model = tiny()
    PassManager([*insertions, *lowering(), RouteProducts()]).run(model.graph)
    for product in _nodes(model.graph, irc.routed_matmul.default):
        (reader,) = product.users
        with product.graph.inserting_after(reader):
            product.graph.call_function(torch.ops.aten.neg.default, (product,))
    assert not PassManager([FuseGates()]).run(model.graph).modified


def test_second_run_changes_nothing(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager([*insertions, *lowering("cuda")]).run(graph)
    text = print_model(graph)
    assert not PassManager([RouteProducts(), FuseGates()]).run(graph).modified
    assert print_model(graph) == text


@pytest.mark.parametrize("calls", [1, 2])
@torch.no_grad()
def test_a_submodule_that_is_called_twice_is_left_alone(calls: int) -> None:
    """Its linear would get the rows of one call only."""
    inside = fx.Graph()
    inside.output(inside.call_module("linear", (inside.placeholder("x"),)))
    inner = fx.GraphModule(nn.ModuleDict({"linear": nn.Linear(4, 4)}), inside)
    graph = fx.Graph()
    x, mask = graph.placeholder("x"), graph.placeholder("mask")
    rows = graph.call_function(operator.getitem, (graph.call_function(irc.select_rows.default, (mask,)), 0))
    y = graph.call_function(irc.compact.default, (x, rows))
    for _ in range(calls):
        y = graph.call_module("inner", (y,))
    graph.output(graph.call_function(irc.scatter.default, (y, rows, x)))
    model = fx.GraphModule(nn.ModuleDict({"inner": inner}), graph)
    inputs = torch.randn(2, 3, 4), torch.rand(2, 3) < 0.5
    expected = model(*inputs)
    assert RouteProducts().call(model).modified == (calls == 1)
    assert len(_nodes(model, irc.routed_matmul.default)) == (calls == 1)
    torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("results", "taken", "routed"),
    [
        ("y", None, 3),
        (("y",), 0, 3),
        (("x", "y"), 1, 3),
        (("y", "x"), 1, 2),
        ("x", None, 1),
        (("x",), 0, 1),
    ],
)
@torch.no_grad()
def test_what_is_on_rows_in_a_submodule_is_on_rows_outside(results: Any, taken: int | None, routed: int) -> None:
    """The submodule returns y, a linear of the rows, or x, of all tokens; a linear reads one of them.

    Another one, behind it, reads the rows themselves.
    """
    inside = fx.Graph()
    rows_of, all_of = inside.placeholder("rows_of"), inside.placeholder("all_of")
    made = {"x": inside.call_function(torch.ops.aten.neg.default, (all_of,))}
    if "y" in results:
        made["y"] = inside.call_module("linear", (rows_of,))
    inside.output(tuple(made[name] for name in results) if isinstance(results, tuple) else made[results])
    inner = fx.GraphModule(nn.ModuleDict({"linear": nn.Linear(4, 4)}), inside)
    graph = fx.Graph()
    x, mask = graph.placeholder("x"), graph.placeholder("mask")
    rows = graph.call_function(operator.getitem, (graph.call_function(irc.select_rows.default, (mask,)), 0))
    compacted = graph.call_function(irc.compact.default, (x, rows))
    call = graph.call_module("inner", (compacted, x))
    read = call if taken is None else graph.call_function(operator.getitem, (call, taken))
    outer, late = graph.call_module("outer", (read,)), graph.call_module("late", (compacted,))
    graph.output((outer, graph.call_function(irc.scatter.default, (late, rows, x))))
    linears = {"outer": nn.Linear(4, 4), "late": nn.Linear(4, 4)}
    model = fx.GraphModule(nn.ModuleDict({"inner": inner, **linears}), graph)
    inputs = torch.randn(2, 3, 4), torch.tensor([[True, False, True], [False, True, True]])
    expected = model(*inputs)
    assert RouteProducts().call(model).modified
    assert len(_nodes(model, irc.routed_matmul.default)) == routed
    for one, other in zip(expected, model(*inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_module_on_rows_that_is_no_linear_stays() -> None:
    graph = fx.Graph()
    x, mask = graph.placeholder("x"), graph.placeholder("mask")
    rows = graph.call_function(operator.getitem, (graph.call_function(irc.select_rows.default, (mask,)), 0))
    y = graph.call_module("act", (graph.call_function(irc.compact.default, (x, rows)),))
    graph.output(graph.call_function(irc.scatter.default, (graph.call_module("linear", (y,)), rows, x)))
    model = fx.GraphModule(nn.ModuleDict({"act": nn.SiLU(), "linear": nn.Linear(4, 4)}), graph)
    inputs = torch.randn(2, 3, 4), torch.rand(2, 3) < 0.5
    expected = model(*inputs)
    assert RouteProducts().call(model).modified
    assert [node.target for node in model.graph.nodes if node.op == "call_module"] == ["act"]
    assert len(_nodes(model, irc.routed_matmul.default)) == 1
    torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=1e-6)
