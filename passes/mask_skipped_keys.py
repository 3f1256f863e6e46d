"""Hides the keys of skipped tokens from chosen attention units: the key/value policy `reduced`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import fx, nn

from passes.base import Pass, PassError, PassResult, finish, graph_of
from passes.match import Unit, match_units

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


class MaskSkippedKeys(Pass):
    """Inserts, round each chosen attention unit, a module that says which tokens have keys, and obeys it.

    The module reads the past keys and the router's logits; tokens without a key leave the unit's mask, and their
    present keys and values become zeros, which stand for none. Runs on captured attention, before RaiseAttention.

    Args:
        units: Names of the attention units.
        make: Returns the module of a unit: (past keys [batch, heads, past, size], logits [batch, tokens, 2]) ->
            bool [batch, past + tokens].
    """

    def __init__(self, units: Collection[str], make: Callable[[Unit], nn.Module]) -> None:
        self.units = units
        self.make = make

    def requires(self, model: fx.GraphModule) -> None:
        """Refuse names that are no attention units, and units without a router."""
        found = {unit.name: unit for unit in match_units(model).units if unit.kind == "attention"}
        for name in self.units:
            if name not in found:
                raise PassError(name, "expected an attention unit", f"choose from {', '.join(found)}")
            block = model.get_submodule(found[name].block)
            if not hasattr(block, f"{found[name].target}_router"):
                raise PassError(name, "expected a router beside the unit", "run InsertRouters first")

    def call(self, model: fx.GraphModule) -> PassResult:
        """Mask the units that are not masked yet."""
        modified = False
        for unit in match_units(model).units:
            block = model.get_submodule(unit.block)
            name = f"{unit.target}_keys"
            if unit.name not in self.units or hasattr(block, name):
                continue
            block.add_module(name, self.make(unit))
            _insert(cast(fx.Graph, block.graph), unit, name, model.get_submodule(unit.name))
            finish(block)
            modified = True
        return PassResult(model, modified)


def _insert(graph: fx.Graph, unit: Unit, name: str, module: nn.Module) -> None:
    nodes = {node.name: node for node in graph.nodes}
    call, router = nodes[unit.call], nodes[f"{unit.target}_router"]
    mask, past, presents = _wires(unit, module)
    call.prepend(router)
    with graph.inserting_before(call):
        stored = graph.create_node("call_module", name, (call.args[past], router), name=name)
        heads = _unsqueeze(graph, stored, 1)
        call.update_arg(mask, graph.call_function(aten.__and__.Tensor, (call.args[mask], _unsqueeze(graph, heads, 1))))
        features = _unsqueeze(graph, heads, -1)
    for reader in [user for user in call.users if user.args[1] in presents]:
        with graph.inserting_after(reader):
            kept = graph.call_function(aten.mul.Tensor, (reader, features))
        reader.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)


def _unsqueeze(graph: fx.Graph, node: fx.Node, dim: int) -> fx.Node:
    return graph.call_function(aten.unsqueeze.default, (node, dim))


def _wires(unit: Unit, module: nn.Module) -> tuple[int, int, list[int]]:
    """Return which input of a captured attention unit is the mask, which a past, and which outputs are presents."""
    graph = graph_of(module)
    assert graph is not None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    outputs: list[Any] = list(next(node for node in graph.nodes if node.op == "output").args[0])
    masks = [node.args[3] for node in graph.nodes if node.target == _SDPA and len(node.args) > 3]
    presents = [index for index, node in enumerate(outputs) if node.target == aten.cat.default]
    pasts = [cast(Any, outputs[index].args[0])[0] for index in presents]
    if len(masks) != 1 or len(presents) != 2 or any(node not in inputs for node in (*masks, *pasts)):
        remedy = "only captured attention with a mask and a key/value cache has this policy"
        raise PassError(unit.name, "its mask or its cache does not come from outside", remedy)
    return inputs.index(masks[0]), inputs.index(pasts[0]), presents
