"""Inserts a forecaster and a mux beside every unit: `mux(unit(x), forecaster(x))` feeds the residual add."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from passes.base import Pass, PassError, PassResult, finish
from passes.match import Unit, match_units

ModuleFactory = Callable[[Unit], nn.Module]


class InsertForecasters(Pass):
    """Inserts, for each unit, a call of its forecaster on the unit's input and a mux after the unit.

    Without a router the mux has no decision to follow and returns the unit's own output.

    Args:
        make_forecaster: Returns the forecaster of a unit, [batch, tokens, d] -> the same shape.
        make_mux: Returns the mux of a unit, called as `mux(y, forecast)`.
    """

    def __init__(self, make_forecaster: ModuleFactory, make_mux: ModuleFactory) -> None:
        self.make_forecaster = make_forecaster
        self.make_mux = make_mux

    def requires(self, model: fx.GraphModule) -> None:
        """Refuse a model without units."""
        found = match_units(model)
        if not found.units:
            reason = found.refusals[0] if found.refusals else None
            detail = f" ({reason.name}: {reason.reason})" if reason else ""
            remedy = "convert a decoder-only model of Llama's shape"
            raise PassError("model", f"no attention or FFN unit matched{detail}", remedy)

    def call(self, model: fx.GraphModule) -> PassResult:
        """Insert forecaster and mux where they are missing."""
        modified = False
        for unit in match_units(model).units:
            block = model.get_submodule(unit.block)
            if hasattr(block, f"{unit.target}_forecaster"):
                continue
            _insert(block, unit, self.make_forecaster(unit), self.make_mux(unit))
            finish(block)
            modified = True
        return PassResult(model, modified)


def _insert(block: nn.Module, unit: Unit, forecaster: nn.Module, mux: nn.Module) -> None:
    graph = block.graph
    assert isinstance(graph, fx.Graph)
    nodes = {node.name: node for node in graph.nodes}
    x, y, add = nodes[unit.x], nodes[unit.y], nodes[unit.add]
    block.add_module(f"{unit.target}_forecaster", forecaster)
    block.add_module(f"{unit.target}_mux", mux)
    with graph.inserting_before(add):
        forecast = graph.create_node("call_module", f"{unit.target}_forecaster", (x,), name=f"{unit.target}_forecaster")
        chosen = graph.create_node("call_module", f"{unit.target}_mux", (y, forecast), name=f"{unit.target}_mux")
    add.replace_input_with(y, chosen)
