"""Fuses the compaction, a linear forecaster and the scatter of its rows into one `irc::forecast_add`."""

from __future__ import annotations

import torch
from torch import fx, nn

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import Pass, PassResult, rewrite_nodes
from passes.wires import transposed_weight

irc = torch.ops.irc


class FuseForecasts(Pass):
    """Replaces `scatter_add(forecaster(compact(x, rows)), rows, base)` by `irc::forecast_add`.

    Run after LowerToCompaction. The bias between the forecaster's two linears moves behind both, which is the same
    where nothing lies between them; a forecaster with an activation there is left alone.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Fuse all linear forecasters."""
        return rewrite_nodes(model, irc.scatter_add.default, _fuse)


def _fuse(graph: fx.Graph, module: nn.Module, add: fx.Node) -> bool:
    call, rows, base = add.args
    if not isinstance(call, fx.Node) or call.op != "call_module" or list(call.users) != [add]:
        return False
    compacted = call.args[0]
    if not isinstance(compacted, fx.Node) or compacted.target != irc.compact.default or compacted.args[1] is not rows:
        return False
    forecaster = module.get_submodule(str(call.target))
    if not _is_linear(forecaster):
        return False
    _merge_biases(forecaster)
    with graph.inserting_before(add):
        down, up = (transposed_weight(graph, f"{call.target}.{name}") for name in ("down", "up"))
        bias = graph.get_attr(f"{call.target}.up.bias")
        fused = graph.call_function(irc.forecast_add.default, (compacted.args[0], rows, base, down, up, bias))
    name = add.name
    fused.meta["val"] = add.meta.get("val")
    add.replace_all_uses_with(fused)
    for node in (add, call, compacted):
        if not node.users:
            graph.erase_node(node)
    fused._rename(name)
    return True


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is two linears with nothing between, of which the second has a bias."""
    parts = dict(module.named_children())
    down, up = parts.get("down"), parts.get("up")
    between = [part for name, part in parts.items() if name not in ("down", "up")]
    linear = isinstance(down, nn.Linear) and isinstance(up, nn.Linear) and up.bias is not None
    return linear and all(isinstance(part, nn.Identity) for part in between)


def _merge_biases(forecaster: nn.Module) -> None:
    down, up = forecaster.get_submodule("down"), forecaster.get_submodule("up")
    assert isinstance(down, nn.Linear)
    assert isinstance(up, nn.Linear)
    if down.bias is None:
        return
    with torch.no_grad():
        merged = up.weight.float() @ down.bias.float() + up.bias.float()
        up.bias = nn.Parameter(merged.to(up.bias.dtype), requires_grad=False)
    # A linear of its own: a router may read the one that was here.
    alone = nn.Linear(down.in_features, down.out_features, bias=False, device="meta")
    alone.weight = down.weight
    forecaster.add_module("down", alone)
