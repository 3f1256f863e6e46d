"""Splits linears that compute several projections at once, such as Phi-3's queries, keys and values."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import fx, nn

from passes.base import Pass, PassResult, finish, graph_of

aten = torch.ops.aten
_NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_CHUNKS = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})

Part = tuple[fx.Node, int, int]


class SplitFusedLinears(Pass):
    """Replaces `linear(x)[..., a:b]` for several ranges by one linear for each range.

    Executed tokens alone can then get queries while all get keys and values, and adapters find the linears that Llama
    has. The new linears hold views of the old weight, under the usual names (`q_proj` ...) or numbered ones.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Split every linear whose result is only read in ranges of features."""
        modified = False
        for module in list(model.modules()):
            graph = graph_of(module)
            if graph is None:
                continue
            calls = [node for node in graph.nodes if node.op == "call_module"]
            changed = [node for node in calls if _split(module, graph, node)]
            if changed:
                finish(module)
                modified = True
        return PassResult(model, modified)


def _split(module: nn.Module, graph: fx.Graph, call: fx.Node) -> bool:
    linear = module.get_submodule(str(call.target))
    if type(linear) is not nn.Linear:
        return False
    parts = _parts(call, linear.out_features)
    if len(parts) < 2:
        return False
    parent, _, leaf = str(call.target).rpartition(".")
    owner = module.get_submodule(parent)
    names = _NAMES.get(leaf, ())
    if len(names) != len(parts) or any(hasattr(owner, name) for name in names):
        names = tuple(f"{leaf}_{index}" for index in range(len(parts)))
    for name, (reader, start, stop) in zip(names, sorted(parts, key=lambda part: part[1]), strict=True):
        owner.add_module(name, _range(linear, start, stop))
        with graph.inserting_before(reader):
            target = f"{parent}.{name}" if parent else name
            alone = graph.create_node("call_module", target, call.args, name=name)
        alone.meta["val"] = reader.meta.get("val")
        reader.replace_all_uses_with(alone)
        graph.erase_node(reader)
    for node in list(call.users):  # the chunk that these parts came from
        graph.erase_node(node)
    graph.erase_node(call)
    if not any(node.target == call.target for node in graph.nodes):
        delattr(owner, leaf)
    return True


def _parts(call: fx.Node, features: int) -> list[Part]:
    """Return (reader, start, stop) for each range of features that is read; empty if a reader takes all features."""
    users = list(call.users)
    if len(users) == 1 and users[0].target in _CHUNKS:
        return _chunks(users[0])
    parts: list[Part] = []
    for user in users:
        if user.target != aten.slice.Tensor or len(user.args) != 4:
            return []
        if user.args[1] not in (-1, user.meta["val"].ndim - 1):
            return []
        start, stop = (min(cast(int, bound), features) for bound in user.args[2:4])
        parts.append((user, start, stop))
    return parts


def _chunks(chunk: fx.Node) -> list[Part]:
    dim = chunk.args[2] if len(chunk.args) > 2 else chunk.kwargs.get("dim", 0)
    items = sorted(chunk.users, key=lambda item: cast(int, item.args[1]))
    if dim not in (-1, 2) or any(item.target is not operator.getitem for item in items):
        return []
    if [item.args[1] for item in items] != list(range(len(items))) or any("val" not in item.meta for item in items):
        return []
    parts: list[Part] = []
    start = 0
    for item in items:
        stop = start + int(item.meta["val"].shape[-1])
        parts.append((item, start, stop))
        start = stop
    return parts


def _range(linear: nn.Linear, start: int, stop: int) -> nn.Linear:
    part = nn.Linear(linear.in_features, stop - start, bias=linear.bias is not None, device="meta")
    part.weight = nn.Parameter(linear.weight.detach()[start:stop], requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.detach()[start:stop], requires_grad=False)
    return part
