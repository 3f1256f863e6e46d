"""Folds the difference of a router's two logits into its last linear, which then has one output instead of two."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx, nn

from passes.base import Pass, PassResult, rewrite_nodes

aten = torch.ops.aten


class FoldDifferences(Pass):
    """Replaces `logits[..., 0] - logits[..., 1]` by one output of a linear whose weights are the difference.

    Run after HardenRouters. The weights are subtracted in float32, so a difference near zero may round otherwise.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Fold all differences whose two logits nothing else reads."""
        return rewrite_nodes(model, aten.sub.Tensor, _fold)


def _fold(graph: fx.Graph, module: nn.Module, difference: fx.Node) -> bool:
    logits = _both_logits(difference)
    call = logits.args[0] if logits is not None else None
    if logits is None or not isinstance(call, fx.Node) or call.op != "call_module" or list(call.users) != [logits]:
        return False
    router = module.get_submodule(str(call.target))
    if not isinstance(router, nn.Sequential) or not _one_output(router):
        return False
    with graph.inserting_before(difference):
        single = graph.call_function(aten.squeeze.dim, (logits, -1))
    selected = difference.all_input_nodes
    name, value = difference.name, difference.meta.get("val")
    difference.replace_all_uses_with(single)
    for node in (difference, *selected):
        graph.erase_node(node)
    single._rename(name)
    single.meta["val"] = value
    for node in (call, logits):
        node.meta.pop("val", None)
    return True


def _both_logits(difference: fx.Node) -> fx.Node | None:
    """Return the node of which a subtraction takes entries 0 and 1 along the last dimension, alone."""
    sides = [side for side in difference.args if isinstance(side, fx.Node)]
    if [side.args[1:] for side in sides if side.target == aten.select.int] != [(-1, 0), (-1, 1)]:
        return None
    sources = {side.args[0] for side in sides}
    source = sources.pop()
    alone = isinstance(source, fx.Node) and not sources and set(source.users) == set(sides)
    if not alone or any(list(side.users) != [difference] for side in sides):
        return None
    return cast(fx.Node, source)


def _one_output(router: nn.Sequential) -> bool:
    """Replace the last linear, of two outputs, by one of a single output."""
    last = router[-1]
    if not isinstance(last, nn.Linear) or last.out_features != 2:
        return False
    single = nn.Linear(last.in_features, 1, last.bias is not None, last.weight.device, last.weight.dtype)
    with torch.no_grad():
        for name, parameter in last.named_parameters():
            execute, approximate = parameter.float()
            single.get_parameter(name).copy_((execute - approximate).view_as(single.get_parameter(name)))
    router[-1] = single
    return True
