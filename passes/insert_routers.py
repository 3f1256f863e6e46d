"""Gives every mux its decision: a router reads the unit's input and says execute or approximate."""

from __future__ import annotations

from torch import fx

from passes.base import Pass, PassError, PassResult, finish
from passes.insert_forecasters import ModuleFactory
from passes.match import match_units


class InsertRouters(Pass):
    """Inserts, for each unit with a mux, a call of its router on the unit's input.

    The router's logits [batch, tokens, 2] (execute, approximate) become the mux's third argument.

    Args:
        make_router: Returns the router of a unit, [batch, tokens, d] -> [batch, tokens, 2].
    """

    def __init__(self, make_router: ModuleFactory) -> None:
        self.make_router = make_router

    def requires(self, model: fx.GraphModule) -> None:
        """Refuse units without a mux: InsertForecasters runs first."""
        for unit in match_units(model).units:
            if not hasattr(model.get_submodule(unit.block), f"{unit.target}_mux"):
                raise PassError(unit.name, "expected a mux beside the unit", "run InsertForecasters first")

    def call(self, model: fx.GraphModule) -> PassResult:
        """Insert routers where they are missing."""
        modified = False
        for unit in match_units(model).units:
            block = model.get_submodule(unit.block)
            if hasattr(block, f"{unit.target}_router"):
                continue
            graph = block.graph
            assert isinstance(graph, fx.Graph)
            nodes = {node.name: node for node in graph.nodes}
            mux = nodes[unit.add]
            block.add_module(f"{unit.target}_router", self.make_router(unit))
            with graph.inserting_before(mux):
                name = f"{unit.target}_router"
                logits = graph.create_node("call_module", name, (nodes[unit.x],), name=name)
            mux.args = (*mux.args, logits)
            finish(block)
            modified = True
        return PassResult(model, modified)
