"""The fusing passes on small graphs by hand: what each one takes, and every way in which it is almost that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from passes.base import Pass
from passes.fold_differences import FoldDifferences
from passes.fuse_forecasts import FuseForecasts
from passes.fuse_gates import FuseGates
from passes.fuse_routers import FuseRouters
from passes.printer import print_graph

aten, irc = torch.ops.aten, torch.ops.irc
WIDTH = 6


def _router(*, act: nn.Module | None = None, bias: tuple[bool, bool] = (True, True), outputs: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4, bias[0]), act or nn.ReLU(), nn.Linear(4, outputs, bias[1]))


class _Doubling(nn.Sequential):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * 2


def _routing(
    router: nn.Module, dtype: torch.dtype = torch.float32, dim: int = -1, twice: str = "", cast: Any = aten._to_copy
) -> fx.GraphModule:
    """Return squeeze(cast(router(x)), dim), of which `twice` names the node that has another reader."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = {"call": graph.call_module("router", (x,))}
    nodes["cast"] = graph.call_function(
        cast.default, (nodes["call"],), {"dtype": dtype} if cast is aten._to_copy else {}
    )
    nodes["squeeze"] = graph.call_function(aten.squeeze.dim, (nodes["cast"], dim), name="logit")
    outputs = [nodes["squeeze"], *([nodes[twice]] if twice else [])]
    nodes["squeeze"].meta["val"] = "a value"
    graph.output(tuple(outputs))
    return fx.GraphModule(nn.ModuleDict({"router": router}), graph)


@torch.no_grad()
def test_a_router_is_one_operator_with_the_old_value() -> None:
    model, x = _routing(_router()), torch.randn(2, 3, WIDTH)
    expected = model(x)[0]
    result = FuseRouters().call(model)
    assert result.modified
    assert result.model is model
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-6)
    fused = next(node for node in model.graph.nodes if node.target == irc.router.default)
    assert (fused.name[:5], fused.meta["val"]) == ("logit", "a value")
    assert not any(node.op == "call_module" or node.target == aten.squeeze.dim for node in model.graph.nodes)


ROUTERS = {
    "another activation": lambda: _routing(_router(act=nn.GELU())),
    "two logits": lambda: _routing(_router(outputs=2)),
    "no first bias": lambda: _routing(_router(bias=(False, True))),
    "no last bias": lambda: _routing(_router(bias=(True, False))),
    "four parts": lambda: _routing(nn.Sequential(*_router(), nn.Identity())),
    "a list of parts": lambda: _routing(nn.Linear(WIDTH, 1)),
    "a forward of its own": lambda: _routing(_Doubling(*_router())),
    "another dtype": lambda: _routing(_router(), torch.float16),
    "another dimension": lambda: _routing(_router(), dim=1),
    "a copy for the cast": lambda: _routing(_router(), cast=aten.clone),
    "a cast that is read": lambda: _routing(_router(), twice="cast"),
    "a call that is read": lambda: _routing(_router(), twice="call"),
}


def _forecaster(*, down: bool = True, up: bool = True, act: nn.Module | None = None) -> nn.Module:
    parts = {"down": nn.Linear(WIDTH, 2, down), "act": act or nn.Identity(), "up": nn.Linear(2, WIDTH, up)}

    class Forecaster(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

        def forward(self, x: torch.Tensor) -> Any:
            return self.up(self.act(self.down(x)))

    return Forecaster()


def _forecasting(
    forecaster: nn.Module, other_rows: bool = False, twice: str = "", taken: Any = irc.compact
) -> fx.GraphModule:
    """Return scatter_add(forecaster(compact(x, rows)), rows, base)."""
    graph = fx.Graph()
    x, rows, others, base = (graph.placeholder(name) for name in ("x", "rows", "others", "base"))
    arguments = (x, others if other_rows else rows) if taken is irc.compact else (x,)
    nodes = {"compact": graph.call_function(taken.default, arguments)}
    nodes["call"] = graph.call_module("forecaster", (nodes["compact"],))
    nodes["add"] = graph.call_function(irc.scatter_add.default, (nodes["call"], rows, base), name="whole")
    nodes["add"].meta["val"] = "a value"
    graph.output((nodes["add"], *([nodes[twice]] if twice else [])))
    return fx.GraphModule(nn.ModuleDict({"forecaster": forecaster}), graph)


ROWS = torch.tensor([[[0, 1], [1, 0]]])


@pytest.mark.parametrize("down", [True, False])
@torch.no_grad()
def test_a_forecast_is_one_operator_whose_bias_holds_both(down: bool) -> None:
    model = _forecasting(_forecaster(down=down))
    inputs = torch.randn(2, 3, WIDTH), ROWS, ROWS, torch.randn(2, 3, WIDTH)
    expected, old = model(*inputs)[0], model.forecaster.down
    assert FuseForecasts().call(model).modified
    torch.testing.assert_close(model(*inputs)[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.forecaster(torch.zeros(WIDTH)), model.forecaster.up.bias, rtol=0, atol=0)
    assert model.forecaster.up.bias.requires_grad != down, "a merged bias is no longer trained"
    assert model.forecaster.down.weight is old.weight
    assert (old.bias is not None) == down, "a router may read the linear that was here"
    assert (model.forecaster.down.in_features, model.forecaster.down.out_features) == (WIDTH, 2)
    fused = next(node for node in model.graph.nodes if node.target == irc.forecast_add.default)
    assert (fused.name[:5], fused.meta["val"]) == ("whole", "a value")
    assert not any(node.target in (irc.compact.default, irc.scatter_add.default) for node in model.graph.nodes)


@torch.no_grad()
def test_rows_that_something_else_reads_stay() -> None:
    model = _forecasting(_forecaster(), twice="compact")
    assert FuseForecasts().call(model).modified
    inputs = torch.randn(2, 3, WIDTH), ROWS, ROWS, torch.randn(2, 3, WIDTH)
    assert torch.equal(model(*inputs)[1], irc.compact(inputs[0], ROWS))


def _with(forecaster: nn.Module, name: str, part: nn.Module) -> nn.Module:
    forecaster.add_module(name, part)
    return forecaster


FORECASTS = {
    "an activation": lambda: _forecasting(_forecaster(act=nn.SiLU())),
    "no last bias": lambda: _forecasting(_forecaster(up=False)),
    "no linear down": lambda: _forecasting(_with(_forecaster(), "down", nn.Identity())),
    "no linear up": lambda: _forecasting(_with(_forecaster(), "up", nn.Identity())),
    "other rows": lambda: _forecasting(_forecaster(), other_rows=True),
    "rows that are not chosen": lambda: _forecasting(_forecaster(), taken=aten.clone),
    "a forecast that is read": lambda: _forecasting(_forecaster(), twice="call"),
}


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


def _differing(
    router: nn.Module | None, entries: Any = ((-1, 0), (-1, 1)), twice: str = "", two: bool = False
) -> fx.GraphModule:
    """Return cast(router(x))[..., 0] - cast(router(x))[..., 1]; with `two`, of two casts."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = {"call": graph.call_module("router", (x,)) if router is not None else x}
    nodes["cast"] = graph.call_function(aten._to_copy.default, (nodes["call"],), {"dtype": torch.float32})
    second = graph.call_function(aten._to_copy.default, (nodes["call"],)) if two else nodes["cast"]
    nodes["first"] = graph.call_function(aten.select.int, (nodes["cast"], *entries[0]))
    nodes["second"] = graph.call_function(aten.select.int, (second, *entries[1]))
    sub = graph.call_function(aten.sub.Tensor, (nodes["first"], nodes["second"]), name="difference")
    sub.meta["val"] = "a value"
    nodes["call"].meta["val"] = nodes["cast"].meta["val"] = "of two logits"
    graph.output((sub, *([nodes[twice]] if twice else [])))
    return fx.GraphModule(nn.ModuleDict({"router": router} if router is not None else {}), graph)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_difference_is_one_output_with_the_old_value(bias: bool) -> None:
    model, x = _differing(_router(outputs=2, bias=(True, bias))), torch.randn(2, 3, WIDTH)
    expected = model(x)[0]
    assert FoldDifferences().call(model).modified
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-6)
    assert (model.router[2].out_features, model.router[2].bias is not None) == (1, bias)
    single = next(node for node in model.graph.nodes if node.target == aten.squeeze.dim)
    assert (single.name[:10], single.meta["val"]) == ("difference", "a value")
    assert not any(node.meta.get("val") == "of two logits" for node in model.graph.nodes)


def test_the_difference_keeps_the_dtype_of_the_linear() -> None:
    model = _differing(_router(outputs=2).bfloat16())
    first = model.router[2].weight.float()
    assert FoldDifferences().call(model).modified
    assert model.router[2].weight.dtype == model.router[2].bias.dtype == torch.bfloat16
    assert torch.equal(model.router[2].weight, (first[:1] - first[1:]).bfloat16())


DIFFERENCES = {
    "the other way round": lambda: _differing(_router(outputs=2), ((-1, 1), (-1, 0))),
    "other logits": lambda: _differing(_router(outputs=3), ((-1, 0), (-1, 2))),
    "another dimension": lambda: _differing(_router(outputs=2), ((1, 0), (1, 1))),
    "three logits": lambda: _differing(_router(outputs=3)),
    "no router": lambda: _differing(None),
    "one linear": lambda: _differing(nn.Linear(WIDTH, 2)),
    "no linear at the end": lambda: _differing(nn.Sequential(*_router(outputs=2), nn.Identity())),
    "two casts": lambda: _differing(_router(outputs=2), two=True),
    "a logit that is read": lambda: _differing(_router(outputs=2), twice="first"),
    "the other logit that is read": lambda: _differing(_router(outputs=2), twice="second"),
    "logits that are read": lambda: _differing(_router(outputs=2), twice="cast"),
    "a call that is read": lambda: _differing(_router(outputs=2), twice="call"),
}
ALMOST = [
    (step, name, make)
    for step, table in (
        (FuseRouters, ROUTERS),
        (FuseForecasts, FORECASTS),
        (FuseGates, GATES),
        (FoldDifferences, DIFFERENCES),
    )
    for name, make in table.items()
]


@pytest.mark.parametrize(("step", "name", "make"), ALMOST, ids=[f"{step.__name__}: {name}" for step, name, _ in ALMOST])
def test_what_is_almost_that_is_left_alone(step: type[Pass], name: str, make: Callable) -> None:
    model = make()
    text = print_graph(model.graph)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert not step().call(model).modified
    assert print_graph(model.graph) == text
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
