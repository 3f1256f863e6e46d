"""Fuses the reading of a router's logit and the choice of rows into one `irc::decide_rows`."""

from __future__ import annotations

import torch
from torch import fx, nn

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import Pass, PassResult, rewrite_nodes

aten, irc = torch.ops.aten, torch.ops.irc


class FuseDecisions(Pass):
    """Replaces `select_rows(not (difference < 0))` by `irc::decide_rows`.

    Run after LowerToCompaction and before RouteProducts. A decision that anything else reads is left alone.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Fuse all decisions that only the choice of rows reads."""
        return rewrite_nodes(model, irc.select_rows.default, _fuse)


def _fuse(graph: fx.Graph, module: nn.Module, choice: fx.Node) -> bool:
    negation = _read_alone(choice, aten.logical_not.default)
    less = _read_alone(negation, aten.lt.Scalar) if negation else None
    if negation is None or less is None or less.args[1] != 0:
        return False
    with graph.inserting_before(choice):
        fused = graph.call_function(irc.decide_rows.default, (less.args[0], *choice.args[1:]))
    name = choice.name
    fused.meta["val"] = choice.meta.get("val")
    choice.replace_all_uses_with(fused)
    for node in (choice, negation, less):
        graph.erase_node(node)
    fused._rename(name)
    return True


def _read_alone(reader: fx.Node, target: object) -> fx.Node | None:
    """Return what a node reads first, if it calls `target` and nothing else reads it."""
    node = reader.args[0]
    return node if isinstance(node, fx.Node) and node.target == target and list(node.users) == [reader] else None
