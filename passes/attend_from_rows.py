"""Rewrites one raised attention unit so that it attends from executed rows alone.

Only executed rows of the unit's output are needed. That need moves backward through everything that treats each token
separately (linears, norms, activations, rotation, the query side of attention) and stops at what every row needs: keys
and values. There `irc::compact` picks the rows. In a reduced unit (see MaskSkippedKeys) keys and values are needed for
executed tokens only, so the need moves through them too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import PassError, finish
from passes.row_wise import is_row_wise

aten, irc = torch.ops.aten, torch.ops.irc


def attend_from_rows(module: nn.Module, name: str, is_reduced: bool) -> None:
    """Give an attention unit a last input, the executed rows, and compute queries, scores and output for them alone.

    In a reduced unit keys and values exist for those rows only too; the slots of its cache are still missing from the
    operator's arguments afterwards.

    Args:
        module: The unit, raised by RaiseAttention.
        name: Path of the unit in the model, for errors.
        is_reduced: Whether skipped tokens store no keys and values.

    Raises:
        PassError: The queries go through something that may mix tokens.
    """
    graph = cast(fx.Graph, module.graph)
    attention = next(node for node in graph.nodes if node.target == irc.attention.default)
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last_input):
        rows = graph.placeholder("executed")
    query, *others = attention.args
    operation = irc.reduced_attention if is_reduced else irc.routed_attention
    with graph.inserting_before(attention):
        needed = _NeededRows(name, module, graph, rows)
        compacted = needed.of(cast(fx.Node, query))
        if is_reduced:
            others[:2] = [needed.of(cast(fx.Node, node)) for node in others[:2]]
        arguments = (compacted, rows, *cast(Any, others))
        routed = graph.call_function(operation.default, arguments, name=operation.__name__)
    attention.replace_all_uses_with(routed)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    finish(module)


def is_raised(graph: fx.Graph) -> bool:
    """Whether the graph of an attention unit holds an attention operator of the dialect."""
    known = (irc.attention.default, irc.routed_attention.default, irc.reduced_attention.default)
    return any(node.target in known for node in graph.nodes)


@dataclass
class _NeededRows:
    """Rebuilds what a node computes, for executed rows only."""

    unit: str
    module: nn.Module
    graph: fx.Graph
    rows: fx.Node
    done: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def of(self, node: fx.Node) -> fx.Node:
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
            return self.graph.create_node("call_module", str(node.target), (self.of(cast(fx.Node, node.args[0])),))
        if node.op == "call_function" and (node.target == irc.rotary.default or is_row_wise(node)):
            return self.graph.node_copy(node, self.of)
        raise PassError(
            f"{self.unit}, node %{node.name}",
            f"queries go through {node.target}, which may mix tokens",
            "only linears, norms and rotation are supported before the scores",
        )


def _is_part_of_input(node: fx.Node) -> bool:
    """Whether a node takes a slice of an input's features: picking rows is cheaper after it."""
    return node.target == aten.slice.Tensor and is_row_wise(node) and cast(fx.Node, node.args[0]).op == "placeholder"
