"""Fuses a router and the reading of its logit into one `irc::router`."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx, nn

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import Pass, PassResult, rewrite_nodes
from passes.wires import transposed_weight

aten = torch.ops.aten


class FuseRouters(Pass):
    """Replaces a router of one output, the cast and the squeeze behind it by `irc::router`.

    Run after FoldDifferences. A router is two linears with a ReLU between; anything else is left alone.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Fuse all routers whose logit nothing else reads."""
        return rewrite_nodes(model, aten.squeeze.dim, _fuse)


def _fuse(graph: fx.Graph, module: nn.Module, squeeze: fx.Node) -> bool:
    single = squeeze.args[0]
    if not isinstance(single, fx.Node) or single.target != aten._to_copy.default or list(single.users) != [squeeze]:
        return False
    if squeeze.args[1] != -1 or single.kwargs.get("dtype") != torch.float32:
        return False
    call = single.args[0]
    if not isinstance(call, fx.Node) or call.op != "call_module" or list(call.users) != [single]:
        return False
    if not _is_router(module.get_submodule(str(call.target))):
        return False
    with graph.inserting_before(call):
        weights = [
            transposed_weight(graph, f"{call.target}.0"),
            graph.get_attr(f"{call.target}.0.bias"),
            transposed_weight(graph, f"{call.target}.2"),
            graph.get_attr(f"{call.target}.2.bias"),
        ]
        fused = graph.call_function(torch.ops.irc.router.default, (call.args[0], *weights))
    name = squeeze.name
    fused.meta["val"] = squeeze.meta.get("val")
    squeeze.replace_all_uses_with(fused)
    for node in (squeeze, single, call):
        graph.erase_node(node)
    fused._rename(name)
    return True


def _is_router(module: nn.Module) -> bool:
    if type(module).forward is not nn.Sequential.forward:  # it does more than its parts
        return False
    if not isinstance(module, nn.Sequential) or [type(part) for part in module] != [nn.Linear, nn.ReLU, nn.Linear]:
        return False
    first, last = cast("tuple[nn.Linear, nn.Linear]", (module[0], module[2]))
    return last.out_features == 1 and first.bias is not None and last.bias is not None
