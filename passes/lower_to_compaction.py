"""Lowers hardened units to compaction: the unit runs on executed tokens alone, its forecaster on the others.

Only executed rows of a unit's output are wanted. That demand moves backward through whatever treats each token by
itself (linears, norms, activations, rotation, the query side of attention) and stops at what every row needs: keys
and values. There `irc::compact` picks the rows. In a reduced attention unit (see MaskSkippedKeys) keys and values are
wanted for executed tokens only, so the demand goes through them too.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import fx, nn

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import Pass, PassError, PassResult, finish, graph_of
from passes.match import ADDS, Unit, after_call, is_row_wise, match_units
from passes.wires import add_input, add_output

aten, irc = torch.ops.aten, torch.ops.irc


class LowerToCompaction(Pass):
    """Replaces `h + where(execute, unit(x), forecaster(x))` by compaction, the unit, and adding scatters onto h.

    Run after RaiseAttention and HardenRouters. K and V are computed for all tokens, except in reduced units, which
    get an input `past_slots_LAYER` and an output: the slots of their cache, as `irc::reduced_attention` has them.
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
            if unit.x not in nodes:  # a unit without a norm before it reads what lowering the last one replaced
                unit = next(found for found in match_units(model).units if found.name == unit.name)
            chosen = nodes.get(unit.add)
            if chosen is None or chosen.target != aten.where.self:
                continue
            _lower(model, block, graph, unit, nodes, chosen)
            finish(block)
            modified = True
        if modified:
            _count_past_by_mask(model)
        return PassResult(model, modified)


def _lower(
    model: fx.GraphModule, block: nn.Module, graph: fx.Graph, unit: Unit, nodes: dict[str, fx.Node], chosen: fx.Node
) -> None:
    column, y, forecast = cast("tuple[fx.Node, fx.Node, fx.Node]", chosen.args)
    execute = cast(fx.Node, column.args[0])
    call, x, after = nodes[unit.call], nodes[unit.x], after_call(nodes, unit)
    module = model.get_submodule(unit.name)
    reduced = _unmask(graph, call)
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
            for node in after:
                y_rows = graph.node_copy(node, partial(_argument_on_rows, y_rows))
        else:
            inner = graph_of(module)
            assert inner is not None
            _demand_queries(unit, module, inner, reduced)
            moved = graph.node_copy(call, lambda node: node)
            moved.args = (*call.args, executed)
            call.replace_all_uses_with(moved)
            for node in after:
                chosen.prepend(node)
            y_rows = y
        # Where the choice is added to the residual stream, its rows go there at once; else every token is replaced,
        # here or in the next line, and x only lends its memory.
        add, stream = _residual_add(chosen)
        operation, base = (irc.scatter_add.default, stream) if add else (irc.scatter.default, x)
        part = graph.call_function(operation, (forecast_rows, skipped, base))
        whole = graph.call_function(operation, (y_rows, executed, part), name=f"{unit.target}_scattered")
    if unit.kind == "attention":
        _move_readers(graph, moved, executed)
    replaced = add or chosen
    whole.meta["val"] = replaced.meta.get("val")
    replaced.replace_all_uses_with(whole)
    carried = reversed(after) if unit.kind == "ffn" else ()
    for node in (*([add] if add else []), chosen, column, forecast, *carried, call):
        graph.erase_node(node)
    if reduced:
        finish(block)
        _lead_slots(model, unit)


def _residual_add(chosen: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the add that alone reads a unit's choice, and the stream that it adds to; None where there is none."""
    users = list(chosen.users)
    if len(users) != 1 or users[0].target not in ADDS or users[0].kwargs or len(users[0].all_input_nodes) != 2:
        return None, None
    return users[0], next(node for node in users[0].all_input_nodes if node is not chosen)


def _unmask(graph: fx.Graph, call: fx.Node) -> bool:
    """Undo what MaskSkippedKeys did round a call, for the operator does it; returns whether it did anything."""
    stored = next((n for n in graph.nodes if n.target == irc.stored.default and n.args[0] in call.args), None)
    if stored is None:
        return False
    for node in list(graph.nodes):
        masks = node.target == aten.__and__.Tensor and node in call.args
        drops = node.target == aten.mul.Tensor and node.args[0] in call.users and _is_spread(node.args[1], stored)
        if masks or drops:
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output", "call_module"))
    return True


def _is_spread(argument: object, mask: fx.Node) -> bool:
    """Whether an argument is a mask with dimensions added to it, and no factor of the model's own."""
    while isinstance(argument, fx.Node) and argument.target == aten.unsqueeze.default:
        argument = argument.args[0]
    return argument is mask


def _lead_slots(model: fx.GraphModule, unit: Unit) -> None:
    """Lead the slots of a reduced unit's cache in from outside, and out."""
    slots = add_input(model, unit.name, f"past_slots_{unit.layer}")
    graph = slots.graph
    attention = next(node for node in graph.nodes if node.target == irc.reduced_attention.default)
    attention.args = (*attention.args[:6], slots, *attention.args[6:])
    with graph.inserting_after(attention):
        present = graph.call_function(operator.getitem, (attention, 3))
    add_output(model, unit.name, present)


def _count_past_by_mask(model: fx.GraphModule) -> None:
    """Take the number of past tokens from the mask: caches may hold fewer tokens, or have room for more."""
    graph = model.graph
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    lengths = [(name, 2) for name in inputs if name.startswith("past_key_values_")]
    for node in [n for n in graph.nodes if n.target == aten.sym_size.int and (str(n.args[0]), n.args[1]) in lengths]:
        with graph.inserting_before(node):
            total, new = (
                graph.call_function(aten.sym_size.int, (inputs[name], 1)) for name in ("attention_mask", "input_ids")
            )
            node.replace_all_uses_with(graph.call_function(operator.sub, (total, new)))
        graph.erase_node(node)
    finish(model)


def _on_rows(graph: fx.Graph, call: fx.Node, x: fx.Node, rows: fx.Node) -> fx.Node:
    """Call a row-wise submodule again on the chosen rows of x."""
    compacted = graph.call_function(irc.compact.default, (x, rows))
    args = tuple(compacted if argument is x else argument for argument in call.args)
    return graph.create_node("call_module", str(call.target), args)


def _argument_on_rows(rows: fx.Node, argument: fx.Node) -> fx.Node:
    return argument if argument.op == "get_attr" else rows


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


def _demand_queries(unit: Unit, module: nn.Module, graph: fx.Graph, reduced: bool) -> None:
    """Rewrite an attention unit so that queries, scores and output exist for executed tokens only.

    In a reduced one keys and values do too; the slots of its cache are still missing from the operator's arguments.
    """
    attention = next(node for node in graph.nodes if node.target == irc.attention.default)
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last_input):
        rows = graph.placeholder("executed")
    query, *others = attention.args
    with graph.inserting_before(attention):
        demand = _Demand(unit, module, graph, rows)
        compacted = demand.rows_of(cast(fx.Node, query))
        if reduced:
            others[:2] = [demand.rows_of(cast(fx.Node, node)) for node in others[:2]]
        operation, name = (
            (irc.reduced_attention, "reduced_attention") if reduced else (irc.routed_attention, "routed_attention")
        )
        routed = graph.call_function(operation.default, (compacted, rows, *cast(Any, others)), name=name)
    attention.replace_all_uses_with(routed)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    finish(module)


def _raised(graph: fx.Graph) -> bool:
    known = (irc.attention.default, irc.routed_attention.default, irc.reduced_attention.default)
    return any(node.target in known for node in graph.nodes)
