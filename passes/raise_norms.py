"""Replaces the many nodes of a captured RMS norm by one `irc::rms_norm`."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx, nn

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import Pass, PassResult, finish, graph_of
from passes.name_modules import PART

aten = torch.ops.aten
_CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.type_as.default})


class RaiseNorms(Pass):
    """Replaces each call of a captured RMS norm by `irc::rms_norm(x, weight, eps)`.

    A norm is a submodule whose graph is `weight * (x * rsqrt(mean(x^2, -1) + eps))` with casts between, or the same
    with `1 + weight` (Gemma), which then becomes a parameter `scale` of the norm. In float32, capture returns x beside
    the result (a cast to the type it has); readers of that output then read x itself.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Raise all norms."""
        modified = False
        for module in list(model.modules()):
            graph = graph_of(module)
            calls = [node for node in graph.nodes if node.op == "call_module"] if graph else []
            changed = [node for node in calls if graph and _raise_call(module, graph, node)]
            if changed:
                finish(module)
                modified = True
        return PassResult(model, modified)


def _raise_call(module: nn.Module, graph: fx.Graph, call: fx.Node) -> bool:
    norm = module.get_submodule(str(call.target))
    found = rms_norm_of(norm)
    if found is None or len(call.args) != 1:
        return False
    eps, outputs, plus_one = found
    weight_name = _scale(norm) if plus_one else "weight"
    x = cast(fx.Node, call.args[0])
    with graph.inserting_after(call):
        result = graph.call_function(
            torch.ops.irc.rms_norm.default, (x, graph.create_node("get_attr", f"{call.target}.{weight_name}"), eps)
        )
    result.meta[PART] = str(call.target)
    weight = cast(fx.Node, result.args[1])
    call.append(weight)
    weight.append(result)
    if isinstance(outputs, str):
        result.meta["val"] = call.meta.get("val")
        call.replace_all_uses_with(result)
    else:
        for item in list(call.users):
            assert item.target is operator.getitem
            what = outputs[cast(int, item.args[1])]
            if what == "norm":
                result.meta["val"] = item.meta.get("val")
            item.replace_all_uses_with(result if what == "norm" else x)
            graph.erase_node(item)
    graph.erase_node(call)
    return True


def _scale(norm: nn.Module) -> str:
    """Give a norm its factor 1 + weight as a parameter; returns its name."""
    weight = cast(nn.Parameter, norm.weight)
    with torch.no_grad():
        scale = (1.0 + weight.float()).to(weight.dtype)
    norm.register_parameter("scale", nn.Parameter(scale, requires_grad=False))
    return "scale"


def rms_norm_of(module: nn.Module) -> tuple[float, str | list[str], bool] | None:
    """Return (eps, outputs, whether the factor is 1 + weight) of a captured RMS norm, None for anything else.

    `outputs` is "norm", or for a graph with several outputs a list of "norm" and "x".
    """
    graph = graph_of(module)
    if graph is None:
        return None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1 or not isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    results = list(result) if isinstance(result, (list, tuple)) else [result]
    what = ["x" if _uncast(node) is inputs[0] else "norm" for node in results]
    if what.count("norm") != 1:
        return None
    outputs = what if isinstance(result, (list, tuple)) else "norm"
    for is_factor, plus_one in ((_is_weight, False), (_is_one_plus_weight, True)):
        eps = _eps(results[what.index("norm")], inputs[0], is_factor)
        if eps is not None:
            return eps, outputs, plus_one
    return None


def _is_weight(node: Any) -> bool:
    node = _uncast(node)
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.target == "weight"


def _is_one_plus_weight(node: Any) -> bool:
    node = _uncast(node)
    added = isinstance(node, fx.Node) and node.target == aten.add.Tensor and not node.kwargs
    return added and any(_is_weight(a) and b == 1 for a, b in (node.args[:2], node.args[1::-1]))


def _eps(node: Any, x: fx.Node, is_factor: Any) -> float | None:
    """Return eps when a node computes factor * (x * rsqrt(mean(x^2) + eps))."""
    scaled = _other(_uncast(node), is_factor)
    inverse = _other(scaled, lambda arg: _uncast(arg) is x)
    shifted = _argument(inverse, aten.rsqrt.default)
    mean = _argument(shifted, aten.add.Tensor)
    square = _argument(mean, aten.mean.dim)
    base = _argument(square, aten.pow.Tensor_Scalar)
    if base is None or _uncast(base) is not x or square.args[1] != 2 or list(mean.args[1]) != [-1]:
        return None
    eps = shifted.args[1]
    return eps if isinstance(eps, float) else None


def _uncast(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _CASTS:
        node = node.args[0]
    return node


def _other(node: Any, is_one: Any) -> Any:
    """Return the factor of a product that is not the one recognised."""
    node = _uncast(node)
    if not isinstance(node, fx.Node) or node.target != aten.mul.Tensor:
        return None
    left, right = node.args[:2]
    for one, other in ((left, right), (right, left)):
        if isinstance(one, fx.Node) and isinstance(other, fx.Node) and is_one(one):
            return other
    return None


def _argument(node: Any, target: Any) -> Any:
    node = _uncast(node)
    return node.args[0] if isinstance(node, fx.Node) and node.target == target else None
