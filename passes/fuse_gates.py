"""Fuses the two products of a gated FFN, their activation and their product into one `irc::routed_gate`."""

from __future__ import annotations

import torch
from torch import fx, nn

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import Pass, PassResult, graph_of, rewrite_nodes

aten, irc = torch.ops.aten, torch.ops.irc


class FuseGates(Pass):
    """Replaces `silu(routed_matmul(x, rows, gate)) * routed_matmul(x, rows, up)` by `irc::routed_gate`.

    Run after RouteProducts. Products with a bias stay as they are, and so do values that another node reads.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Fuse all gates."""
        return rewrite_nodes(model, aten.mul.Tensor, _fuse)


def _fuse(graph: fx.Graph, module: nn.Module, mul: fx.Node) -> bool:
    for act, up in (mul.args, mul.args[::-1]):
        if not isinstance(act, fx.Node) or not isinstance(up, fx.Node) or not _is_silu(module, act):
            continue
        gate = act.args[0]
        if not isinstance(gate, fx.Node) or any(node.target != irc.routed_matmul.default for node in (gate, up)):
            continue
        if gate.args[:2] != up.args[:2] or any(len(node.users) != 1 for node in (gate, act, up)):
            continue
        with graph.inserting_before(mul):
            fused = graph.call_function(irc.routed_gate.default, (*gate.args, up.args[2]))
        name = mul.name
        fused.meta["val"] = mul.meta.get("val")
        mul.replace_all_uses_with(fused)
        for node in (mul, act, gate, up):
            graph.erase_node(node)
        fused._rename(name)
        return True
    return False


def _is_silu(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a SiLU, or calls a submodule that computes a SiLU alone."""
    if node.op != "call_module":
        return bool(node.target == aten.silu.default)
    called = module.get_submodule(str(node.target))
    graph = graph_of(called)
    if graph is None:
        return isinstance(called, nn.SiLU)
    return [n.target for n in graph.nodes if n.op not in ("placeholder", "output")] == [aten.silu.default]
