"""FuseGates on small hand-written graphs: those that it fuses, and every near miss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from passes.fuse_gates import FuseGates
from passes.printer import print_graph

aten, irc = torch.ops.aten, torch.ops.irc
WIDTH = 6
ROWS = torch.tensor([[[0, 1], [1, 0]]])


def _gating(
    act: Any = aten.silu, up_first: bool = False, other: str = "", twice: str = "", up_is: Any = irc.routed_matmul
) -> fx.GraphModule:
    """Return act(routed_matmul(x, rows, gate)) * routed_matmul(x, rows, up)."""
    graph = fx.Graph()
    named = {name: graph.placeholder(name) for name in ("x", "rows", "gate", "up", "x2", "rows2")}
    x, rows = (named["x2"] if other == "x" else named["x"]), (named["rows2"] if other == "rows" else named["rows"])
    nodes = {"gate": graph.call_function(irc.routed_matmul.default, (named["x"], named["rows"], named["gate"]))}
    is_module = isinstance(act, nn.Module)
    nodes["act"] = (
        graph.call_module("act", (nodes["gate"],)) if is_module else graph.call_function(act.default, (nodes["gate"],))
    )
    arguments = (x, rows, named["up"]) if up_is is irc.routed_matmul else (x,)
    nodes["up"] = graph.call_function(up_is.default, arguments)
    factors = nodes["act"], nodes["up"]
    mul = graph.call_function(aten.mul.Tensor, factors[::-1] if up_first else factors, name="hidden")
    mul.meta["val"] = "a value"
    graph.output((mul, *([nodes[twice]] if twice else [])))
    return fx.GraphModule(nn.ModuleDict({"act": act} if is_module else {}), graph)


def _traced(function: Callable) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(function(graph, graph.placeholder("x")))
    return fx.GraphModule(nn.Module(), graph)


_SILU = lambda graph, x: graph.call_function(aten.silu.default, (x,))  # noqa: E731
_GELU = lambda graph, x: graph.call_function(aten.gelu.default, (x,))  # noqa: E731
_SILU_TWICE = lambda graph, x: _SILU(graph, _SILU(graph, x))  # noqa: E731

GATES_THAT_FUSE = {
    "an operator": lambda: _gating(),
    "the other order": lambda: _gating(up_first=True),
    "a module": lambda: _gating(nn.SiLU()),
    "a captured module": lambda: _gating(_traced(_SILU)),
}


@pytest.mark.parametrize("make", GATES_THAT_FUSE.values(), ids=GATES_THAT_FUSE)
def test_a_gate_is_one_operator(make: Callable) -> None:
    model = make()
    x, gate, up = torch.randn(1, 2, WIDTH), torch.randn(WIDTH, 4), torch.randn(WIDTH, 4)
    expected = model(x, ROWS, gate, up, x, ROWS)[0]
    assert FuseGates().call(model).modified
    torch.testing.assert_close(model(x, ROWS, gate, up, x, ROWS)[0], expected, rtol=0, atol=1e-6)
    fused = [node for node in model.graph.nodes if node.op.startswith("call")]
    assert [(node.target, node.name[:6], node.meta["val"]) for node in fused] == [
        (irc.routed_gate.default, "hidden", "a value")
    ]


GATES = {
    "another activation": lambda: _gating(aten.gelu),
    "a module of another activation": lambda: _gating(nn.GELU()),
    "a captured module of another activation": lambda: _gating(_traced(_GELU)),
    "two activations": lambda: _gating(_traced(_SILU_TWICE)),
    "another input": lambda: _gating(other="x"),
    "other rows": lambda: _gating(other="rows"),
    "no product": lambda: _gating(up_is=aten.clone),
    "a gate that is read": lambda: _gating(twice="gate"),
    "an activation that is read": lambda: _gating(twice="act"),
    "a product that is read": lambda: _gating(twice="up"),
}


@pytest.mark.parametrize("make", GATES.values(), ids=GATES)
def test_what_is_almost_a_gate_is_left_alone(make: Callable) -> None:
    model = make()
    text = print_graph(model.graph)
    assert not FuseGates().call(model).modified
    assert print_graph(model.graph) == text
