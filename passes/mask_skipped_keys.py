"""Hides the keys of skipped tokens from chosen attention units: the key/value policy `reduced`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import fx, nn

from passes.base import Pass, PassError, PassResult, finish, graph_of
from passes.match import Unit, match_units

KEYS, KEPT = "_keys", "_kept"
"""What follows a unit's name in the names of the two modules that this pass inserts beside it."""
aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default


class MaskSkippedKeys(Pass):
    """Inserts, around each chosen attention unit, a module that says which tokens have keys, and what obeys it.

    The module `UNIT_keys` reads the unit's mask, the past keys and the router's logits; the mask that it returns goes
    to the unit. A module `UNIT_kept` turns present keys and values without a stored token into zeros, which stand for
    none. Runs on captured attention, before RaiseAttention.

    Args:
        units: Names of the attention units.
        make_keys: Returns the module `UNIT_keys`: (mask [batch, 1, tokens, past + tokens], past keys
            [batch, heads, past, size], logits [batch, tokens, 2]) -> (mask, bool [batch, past + tokens]).
    """

    def __init__(self, units: Collection[str], make_keys: Callable[[Unit], nn.Module]) -> None:
        self.units = units
        self.make_keys = make_keys

    def requires(self, model: fx.GraphModule) -> None:
        """Refuse names that are not attention units, and units without a router."""
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
            if unit.name not in self.units or hasattr(block, f"{unit.target}{KEYS}"):
                continue
            _insert(block, unit, self.make_keys(unit), model.get_submodule(unit.name))
            finish(block)
            modified = True
        return PassResult(model, modified)


class KeepStored(nn.Module):
    """Turns keys or values of tokens that are not stored into zeros."""

    def forward(self, present: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """Return present [batch, heads, tokens, size] with zeros where stored [batch, tokens] is false."""
        return present * stored[:, None, :, None]


def _insert(block: nn.Module, unit: Unit, make_mask: nn.Module, attention: nn.Module) -> None:
    graph = cast(fx.Graph, block.graph)
    keys_name, kept_name = f"{unit.target}{KEYS}", f"{unit.target}{KEPT}"
    block.add_module(keys_name, make_mask)
    block.add_module(kept_name, KeepStored())
    nodes = {node.name: node for node in graph.nodes}
    call, router = nodes[unit.call], nodes[f"{unit.target}_router"]
    mask, past, presents = _mask_and_cache(unit, attention)
    call.prepend(router)
    with graph.inserting_before(call):
        inputs = (call.args[mask], call.args[past], router)
        keys = graph.create_node("call_module", keys_name, inputs, name=keys_name)
        seen, stored = (graph.call_function(operator.getitem, (keys, index)) for index in range(2))
        call.update_arg(mask, seen)
    for reader in [user for user in call.users if user.args[1] in presents]:
        with graph.inserting_after(reader):
            kept = graph.create_node("call_module", kept_name, (reader, stored))
        reader.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)


def _mask_and_cache(unit: Unit, attention: nn.Module) -> tuple[int, int, list[int]]:
    """Return which input of a captured attention unit is the mask, which a past, and which outputs are presents."""
    graph = graph_of(attention)
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
