"""Lowers hardened units to compaction: the unit runs on executed tokens alone, its forecaster on the others.

Only executed rows of a unit's output are wanted. That demand moves backward through whatever treats each token by
itself (linears, norms, activations, rotation, the query side of attention) and stops at what every row needs: keys
and values. There `irc::compact` picks the rows.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import Pass, PassError, PassResult, finish, graph_of
from passes.match import Unit, is_row_wise, match_units

aten, irc = torch.ops.aten, torch.ops.irc


class LowerToCompaction(Pass):
    """Replaces `where(execute, unit(x), forecaster(x))` by compaction, the unit, and scatter.

    Run after RaiseAttention and HardenRouters. K and V are computed for all tokens.
    """

    def requires(self, model: fx.GraphModule) -> None:
        """Refuse attention units that were not raised."""
        for unit in match_units(model).units:
            graph = graph_of(model.get_submodule(unit.name))
            if unit.kind == "attention" and graph and not _raised(graph):
                raise PassError(unit.name, "expected a raised attention unit", "run RaiseAttention first")

    def call(self, model: fx.GraphModule) -> PassResult:
        """Lower all hardened units."""
        modified = False
        for unit in match_units(model).units:
            block = model.get_submodule(unit.block)
            graph = cast(fx.Graph, block.graph)
            nodes = {node.name: node for node in graph.nodes}
            chosen = nodes.get(unit.add)
            if chosen is None or chosen.target != aten.where.self:
                continue
            _lower(model, block, graph, unit, nodes, chosen)
            finish(block)
            modified = True
        return PassResult(model, modified)


def _lower(
    model: nn.Module, block: nn.Module, graph: fx.Graph, unit: Unit, nodes: dict[str, fx.Node], chosen: fx.Node
) -> None:
    column, y, forecast = cast("tuple[fx.Node, fx.Node, fx.Node]", chosen.args)
    execute = cast(fx.Node, column.args[0])
    call, x = nodes[unit.call], nodes[unit.x]
    module = model.get_submodule(unit.name)
    # The unit's own call moves behind the decision: K and V do not wait for it, but one call makes them and y.
    with graph.inserting_before(chosen):
        both = graph.call_function(irc.select_rows.default, (execute,))
        executed, skipped = (
            graph.call_function(operator.getitem, (both, index), name=f"{unit.target}_{name}")
            for index, name in enumerate(("executed", "skipped"))
        )
        forecast_rows = _on_rows(graph, forecast, x, skipped)
        if unit.kind == "ffn":
            y_rows = _on_rows(graph, call, x, executed)
        else:
            inner = graph_of(module)
            assert inner is not None
            _demand_queries(unit, module, inner)
            moved = graph.node_copy(call, lambda node: node)
            moved.args = (*call.args, executed)
            call.replace_all_uses_with(moved)
            y_rows = y
        # Every token is replaced, here or in the next line: x only lends its memory.
        base = graph.call_function(irc.scatter.default, (forecast_rows, skipped, x))
        whole = graph.call_function(irc.scatter.default, (y_rows, executed, base), name=f"{unit.target}_scattered")
    if unit.kind == "attention":
        _move_readers(graph, moved, executed)
    whole.meta["val"] = chosen.meta.get("val")
    chosen.replace_all_uses_with(whole)
    for node in (chosen, column, forecast, call):
        graph.erase_node(node)


def _on_rows(graph: fx.Graph, call: fx.Node, x: fx.Node, rows: fx.Node) -> fx.Node:
    """Call a row-wise submodule again on the chosen rows of x."""
    compacted = graph.call_function(irc.compact.default, (x, rows))
    args = tuple(compacted if argument is x else argument for argument in call.args)
    return graph.create_node("call_module", str(call.target), args)


def _move_readers(graph: fx.Graph, moved: fx.Node, executed: fx.Node) -> None:
    """Put the outputs of a unit's call behind the call, and the call behind what it reads."""
    executed.append(moved)
    last = moved
    for reader in [user for user in moved.users if user.target is operator.getitem]:
        last.append(reader)
        last = reader


@dataclass
class _Demand:
    """Rebuilds what a node computes, for executed rows only."""

    unit: Unit
    module: nn.Module
    graph: fx.Graph
    rows: fx.Node
    done: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def rows_of(self, node: fx.Node) -> fx.Node:
        """Return the node that holds the executed rows of `node`, [1, n, ...]."""
        if node not in self.done:
            self.done[node] = self._build(node)
        return self.done[node]

    def _build(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder" or _is_part_of_input(node):
            return self.graph.call_function(irc.compact.default, (node, self.rows))
        if node.op == "get_attr":
            return node
        if node.op == "call_module" and isinstance(self.module.get_submodule(str(node.target)), nn.Linear):
            return self.graph.create_node("call_module", str(node.target), (self.rows_of(cast(fx.Node, node.args[0])),))
        if node.op == "call_function" and (node.target == irc.rotary.default or is_row_wise(node)):
            return self.graph.node_copy(node, self.rows_of)
        raise PassError(
            f"{self.unit.name}, node %{node.name}",
            f"queries go through {node.target}, which may mix tokens",
            "only linears, norms and rotation may stand before the scores",
        )


def _is_part_of_input(node: fx.Node) -> bool:
    """Whether a node takes a slice of an input's features: picking rows is cheaper after it."""
    return node.target == aten.slice.Tensor and is_row_wise(node) and cast(fx.Node, node.args[0]).op == "placeholder"


def _demand_queries(unit: Unit, module: nn.Module, graph: fx.Graph) -> None:
    """Rewrite an attention unit so that queries, scores and output exist for executed tokens only."""
    attention = next(node for node in graph.nodes if node.target == irc.attention.default)
    output = next(node for node in graph.nodes if node.op == "output")
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last_input):
        rows = graph.placeholder("executed")
    query, *others = attention.args
    with graph.inserting_before(attention):
        demand = _Demand(unit, module, graph, rows)
        compacted = demand.rows_of(cast(fx.Node, query))
        routed = graph.call_function(
            irc.routed_attention.default, (compacted, rows, *cast(Any, others)), name="routed_attention"
        )
    attention.replace_all_uses_with(routed)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    assert output.args
    finish(module)


def _raised(graph: fx.Graph) -> bool:
    return any(node.target in (irc.attention.default, irc.routed_attention.default) for node in graph.nodes)
