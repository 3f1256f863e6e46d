"""Lets each expert of a mixture compute only the tokens that chose it."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import Pass, PassResult, finish, graph_of

aten, irc = torch.ops.aten, torch.ops.irc


class RouteExperts(Pass):
    """Replaces `expert(x) * sum(weights * (index == i))` by the same on the tokens whose index holds i.

    Run after LowerUnits: the experts' rows are chosen among those that the unit executes, and the matcher does not
    accept the rewritten mixture as row-wise.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Rewrite every sum of experts."""
        modified = False
        for module in list(model.modules()):
            graph = graph_of(module)
            if graph is None:
                continue
            terms = [node for node in graph.nodes if _choice(node) is not None]
            for term in terms:
                _route(graph, term)
            if terms:
                graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
                finish(module)
                modified = True
        return PassResult(model, modified)


def _choice(term: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Return (call of the expert, weight [batch, tokens, 1], index == i) of a term of the sum."""
    if term.target != aten.mul.Tensor or not all(isinstance(arg, fx.Node) for arg in term.args):
        return None
    call, weight = cast("tuple[fx.Node, fx.Node]", term.args)
    if call.op != "call_module" or list(call.users) != [term] or weight.target != aten.sum.dim_IntList:
        return None
    product = cast(fx.Node, weight.args[0])
    chosen: Any = product.args[1] if product.target == aten.mul.Tensor else None
    if not isinstance(chosen, fx.Node) or chosen.target != aten.eq.Scalar or len(call.args) != 1:
        return None
    return call, weight, chosen


def _route(graph: fx.Graph, term: fx.Node) -> None:
    found = _choice(term)
    assert found is not None
    call, weight, chosen = found
    x = cast(fx.Node, call.args[0])
    add = next((user for user in term.users if user.target == aten.add.Tensor and user.args[1] is term), None)
    end = add or term
    with graph.inserting_before(end):
        mask = graph.call_function(aten.any.dim, (chosen, -1))
        both = graph.call_function(irc.select_rows.default, (mask,))
        rows = graph.call_function(operator.getitem, (both, 0))
        compacted, weights = (graph.call_function(irc.compact.default, (node, rows)) for node in (x, weight))
        y = graph.create_node("call_module", str(call.target), (compacted,))
        part = graph.call_function(aten.mul.Tensor, (y, weights))
        base = add.args[0] if add else graph.call_function(aten.zeros_like.default, (x,))
        whole = graph.call_function(irc.scatter_add.default, (part, rows, base))
    whole.meta["val"] = end.meta.get("val")
    end.replace_all_uses_with(whole)
    for node in dict.fromkeys((end, term, call)):
        graph.erase_node(node)
