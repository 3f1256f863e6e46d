"""Turns every mux from a module that can sample into nodes that decide by the larger of two logits.

What says which tokens of a reduced attention unit have keys follows the same decision.
"""

from __future__ import annotations

import torch
from torch import fx

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import Pass, PassResult, finish, graph_of
from passes.match import is_mux

aten = torch.ops.aten
EXECUTE, APPROXIMATE = 0, 1


class HardenRouters(Pass):
    """Replaces `mux(y, forecast, logits)` by a comparison and a `where`; a mux without a router passes y on.

    The comparison runs in float32 whatever the model's dtype; equal logits execute, and so do
    logits that are no numbers, as in `irc.model.modules.Mux`.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Harden all muxes; the mux modules are dropped."""
        modified = False
        for module in list(model.modules()):
            graph = graph_of(module)
            muxes = [node for node in graph.nodes if is_mux(node)] if graph else []
            for mux in muxes:
                assert graph is not None
                for node in (_keys_of(graph, mux), mux):
                    if node is not None:
                        delattr(module, str(node.target))
                _harden(graph, mux, _keys_of(graph, mux))
            if muxes:
                finish(module)
                modified = True
        return PassResult(model, modified)


def _keys_of(graph: fx.Graph, mux: fx.Node) -> fx.Node | None:
    """Return the node that says which tokens of the mux's unit have keys, where the unit is reduced."""
    name = str(mux.target).removesuffix("_mux") + "_keys"
    return next((node for node in graph.nodes if node.op == "call_module" and node.target == name), None)


def _harden(graph: fx.Graph, mux: fx.Node, keys: fx.Node | None) -> None:
    y, forecast = mux.args[:2]
    assert isinstance(y, fx.Node)
    assert isinstance(forecast, fx.Node)
    chosen = y
    if len(mux.args) == 3:
        logits = mux.args[2]
        with graph.inserting_before(keys or mux):
            # The names make the decision findable: by later passes, and as outputs that parity checks read.
            stem = str(mux.target).removesuffix("_mux")
            single = graph.call_function(aten._to_copy.default, (logits,), {"dtype": torch.float32})
            execute, approximate = (
                graph.call_function(aten.select.int, (single, -1, index)) for index in (EXECUTE, APPROXIMATE)
            )
            difference = graph.call_function(aten.sub.Tensor, (execute, approximate), name=f"{stem}_difference")
            # Not "at least 0": of a difference that is no number, both comparisons are false, and it executes.
            less = graph.call_function(aten.lt.Scalar, (difference, 0), name=f"{stem}_approximate")
            decision = graph.call_function(aten.logical_not.default, (less,), name=f"{stem}_execute")
            if keys is not None:
                keys.replace_all_uses_with(graph.call_function(torch.ops.irc.stored.default, (keys.args[0], decision)))
                graph.erase_node(keys)
        with graph.inserting_before(mux):
            column = graph.call_function(aten.unsqueeze.default, (decision, -1))
            chosen = graph.call_function(aten.where.self, (column, y, forecast), name=f"{stem}_chosen")
        if "val" in y.meta:
            chosen.meta["val"] = y.meta["val"]
    mux.replace_all_uses_with(chosen)
    graph.erase_node(mux)
    if not forecast.users:
        graph.erase_node(forecast)
