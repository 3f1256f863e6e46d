"""Inserts a router for every mux: it reads the unit's input and decides to execute or to approximate."""

from __future__ import annotations

from typing import Literal

from torch import fx

from passes.base import Pass, PassError, PassResult, finish
from passes.insert_forecasters import ModuleFactory
from passes.match import ADDS, Unit, match_units

Reads = Literal["unit", "stream", "layer"]


class InsertRouters(Pass):
    """Inserts, for each unit with a mux, a call of its router.

    The router's logits [batch, tokens, 2] (execute, approximate) become the mux's third argument.

    Args:
        make_router: Returns the router of a unit, [batch, tokens, d] -> [batch, tokens, 2].
        reads: What routers read: the `unit`'s own input (normed), the residual `stream` that the unit adds to, or
            the `layer`'s input, which is the stream of the layer's first unit (as SkipGPT's routers do).
    """

    def __init__(self, make_router: ModuleFactory, reads: Reads = "unit") -> None:
        self.make_router = make_router
        self.reads = reads

    def requires(self, model: fx.GraphModule) -> None:
        """Refuse units without a mux: InsertForecasters runs first."""
        for unit in match_units(model).units:
            if not hasattr(model.get_submodule(unit.block), f"{unit.target}_mux"):
                raise PassError(unit.name, "expected a mux beside the unit", "run InsertForecasters first")

    def call(self, model: fx.GraphModule) -> PassResult:
        """Insert routers where they are missing."""
        modified = False
        units = match_units(model).units
        first = {unit.block: unit for unit in reversed(units)}
        for unit in units:
            block = model.get_submodule(unit.block)
            if hasattr(block, f"{unit.target}_router"):
                continue
            graph = block.graph
            assert isinstance(graph, fx.Graph)
            nodes = {node.name: node for node in graph.nodes}
            mux = nodes[unit.add]
            if self.reads == "unit":
                source = nodes[unit.x]
            else:
                source = _stream(nodes, unit if self.reads == "stream" else first[unit.block])
            block.add_module(f"{unit.target}_router", self.make_router(unit))
            with graph.inserting_before(mux):
                name = f"{unit.target}_router"
                logits = graph.create_node("call_module", name, (source,), name=name)
            mux.args = (*mux.args, logits)
            finish(block)
            modified = True
        return PassResult(model, modified)


def _stream(nodes: dict[str, fx.Node], unit: Unit) -> fx.Node:
    """Return the residual stream that a unit with a mux adds to."""
    mux = nodes[unit.add]
    add = next((user for user in mux.users if user.target in ADDS), None)
    others = [node for node in add.all_input_nodes if node is not mux] if add else []
    if len(others) != 1:
        raise PassError(unit.name, f"expected the mux %{mux.name} in a residual add", "insert routers before lowering")
    return others[0]
