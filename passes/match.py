"""Finds the units of a captured model: attention and FFN sublayers that add to a residual stream.

Matching goes by structure and dataflow. In every captured graph that has submodule calls it looks for
`add(stream, y)` where `y` comes out of one submodule call. That submodule is an attention unit when it
computes scores (scaled dot-product attention, or a softmax between products), an FFN unit when it is built
of linears and row-wise operators only. The unit's input `x` is the one tensor that its first linears read. A norm, a
factor or a dropout between the submodule and the add belongs to the unit: `y` is the value that the add reads.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import fx, nn

from passes import dialect  # noqa: F401 - registers the operators
from passes.row_wise import is_row_wise, operator_name

Kind = Literal["attention", "ffn"]

ADDS = frozenset({torch.ops.aten.add.Tensor})
_SCATTERS = frozenset({torch.ops.irc.scatter.default, torch.ops.irc.scatter_add.default})
_SCORES = frozenset({"scaled_dot_product_attention", "attention", "routed_attention", "reduced_attention"})
_SOFTMAX, _PRODUCTS = frozenset({"softmax", "_softmax"}), frozenset({"matmul", "bmm", "einsum"})


@dataclass(frozen=True)
class Unit:
    """One attention or FFN sublayer of a decoder layer, without the norm before it and its residual add.

    Attributes:
        name: Path of the submodule in the model, such as `model.layers.3.mlp`.
        kind: `attention` or `ffn`.
        layer: Index of the decoder layer, counted over the model.
        block: Path of the captured module whose graph calls the unit.
        target: Name of the submodule in the block.
        call: Name of the node that calls it.
        x: Name of the node that is the unit's input, [batch, tokens, width].
        y: Name of the node that is the unit's output, [batch, tokens, width].
        add: Name of the residual add that takes `y`, or of the mux or scatter that takes its place.
        width: Size of the hidden state.
        reason: Why it is of this kind.
    """

    name: str
    kind: Kind
    layer: int
    block: str
    target: str
    call: str
    x: str
    y: str
    add: str
    width: int
    reason: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a submodule with linears is not a unit."""

    name: str
    reason: str


@dataclass(frozen=True)
class MatchResult:
    """All units in the order in which a token meets them, and the near misses."""

    units: tuple[Unit, ...]
    refusals: tuple[Refusal, ...]

    def why(self, name: str) -> str:
        """Say how the submodule whose path ends in `name` was matched, or why the matcher rejected it."""
        for unit in self.units:
            if unit.name == name or unit.name.endswith("." + name):
                flow = f"its linears read only %{unit.x}, and only the residual stream reads its output %{unit.y}"
                return (
                    f"{unit.name}: matched as {unit.kind} of width {unit.width}, because {unit.reason}, {flow} "
                    f"(at %{unit.add})"
                )
        for refusal in self.refusals:
            if refusal.name == name or refusal.name.endswith("." + name):
                return f"{refusal.name}: not matched: {refusal.reason}"
        near = ", ".join(unit.name for unit in self.units[:2])
        return f"{name}: no submodule of that name holds linears; units are named like {near or 'model.layers.0.mlp'}"


class _NoMatch(Exception):
    """Carries the reason why a call is not a unit."""


def match_units(model: fx.GraphModule) -> MatchResult:
    """Find all units of a captured model.

    Args:
        model: The captured model, which is not changed.
    """
    units: list[Unit] = []
    refusals: list[Refusal] = []
    layers: dict[str, int] = {}
    for path, block in _blocks(model):
        graph = cast(fx.Graph, block.graph)
        for node in graph.nodes:
            if node.op != "call_module" or any(is_mux(user) and node in user.args[1:] for user in node.users):
                continue
            if not _has_linear(block.get_submodule(str(node.target))):
                continue
            name = f"{path}.{node.target}"
            try:
                layer = layers.get(path, len(layers))
                units.append(_match_call(block, node, path, layer))
                layers[path] = layer
            except _NoMatch as error:
                refusals.append(Refusal(name, str(error)))
    return MatchResult(tuple(units), tuple(refusals))


def _blocks(model: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    """Yield captured submodules whose graph has a residual add of a submodule's output."""
    for path, module in model.named_modules():
        graph = getattr(module, "graph", None)
        if path and isinstance(graph, fx.Graph):
            calls = [node for node in graph.nodes if node.op == "call_module"]
            if any(_residual_adds(module, node) for node in calls):
                yield path, module


def _match_call(block: nn.Module, call: fx.Node, path: str, layer: int) -> Unit:
    submodule = block.get_submodule(str(call.target))
    kind, reason = _kind(submodule)
    adds = _residual_adds(block, call)
    if not adds:
        raise _NoMatch("none of its outputs is added to the residual stream")
    if len(adds) > 1:
        raise _NoMatch(f"its outputs feed {len(adds)} adds; expected one residual add")
    result, y, add = adds[0]
    if len(y.users) != 1:
        raise _NoMatch(f"its output %{y.name} has {len(y.users)} readers; expected the residual add alone")
    x, width = _input(submodule, call)
    _check_output(submodule, kind, result, call, width)
    target = str(call.target)
    nodes = (call.name, x.name, y.name, add.name)
    return Unit(f"{path}.{target}", kind, layer, path, target, *nodes, width, reason)


def _residual_adds(block: nn.Module, call: fx.Node) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """Return (output of the call, y, add): an add, or a mux before one, joins y, made of the output, to a stream."""
    outputs = [user for user in call.users if user.target is operator.getitem] or [call]
    found = []
    for output in outputs:
        y = output
        while (after := _carried_on(block, y)) is not None:
            y = after
        for user in y.users:
            is_add = user.op == "call_function" and user.target in ADDS and len(user.all_input_nodes) == 2
            if is_add or _chooses(user, y):
                found.append((output, y, user))
    return found


def _carried_on(block: nn.Module, node: fx.Node) -> fx.Node | None:
    """Return the only reader of a node if it treats each token separately, as a norm or a factor does; else None."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    if [source for source in reader.all_input_nodes if source.op != "get_attr"] != [node]:
        return None
    if reader.op == "call_function":
        return reader if is_row_wise(reader) else None
    if reader.op != "call_module" or is_mux(reader):
        return None
    module = block.get_submodule(str(reader.target))
    graphs = list(_graphs(module))
    functions = [n for graph in graphs for n in graph.nodes if n.op == "call_function"]  # none in an identity
    linears = any(isinstance(child, nn.Linear) for child in module.modules())
    return reader if graphs and not linears and all(map(is_row_wise, functions)) else None


def after_call(nodes: dict[str, fx.Node], unit: Unit) -> list[fx.Node]:
    """Return the nodes between a unit's call and its output `y`, in order; often there are none."""
    found: list[fx.Node] = []
    node, call = nodes[unit.y], nodes[unit.call]
    while node is not call and not (node.target is operator.getitem and node.args[0] is call):
        found.insert(0, node)
        node = next(source for source in node.all_input_nodes if source.op != "get_attr")
    return found


def is_mux(node: fx.Node) -> bool:
    """Whether a node calls a mux, which InsertForecasters put between a unit and its residual add."""
    return node.op == "call_module" and str(node.target).endswith("_mux")


def _chooses(node: fx.Node, y: fx.Node) -> bool:
    """Whether a node takes y as the executed side: a mux, or what lowering makes of one."""
    return (is_mux(node) or node.target in _SCATTERS) and node.args[0] is y


def _kind(submodule: nn.Module) -> tuple[Kind, str]:
    """Return the kind of a submodule and why it is of this kind."""
    nodes = [node for graph in _graphs(submodule) for node in graph.nodes if node.op == "call_function"]
    names = {operator_name(node) for node in nodes}
    if names & _SCORES or (names & _SOFTMAX and names & _PRODUCTS):
        scores = names & (_SCORES | _SOFTMAX | _PRODUCTS)
        return "attention", f"it computes attention scores ({', '.join(sorted(scores))})"
    for node in nodes:
        if not is_row_wise(node):
            found = f"it holds no attention scores, and {operator_name(node)} may mix tokens"
            raise _NoMatch(f"{found}; expected linears and row-wise operators")
    return "ffn", f"it holds only linears and row-wise operators ({', '.join(sorted(names)) or 'none'})"


def _graphs(module: nn.Module) -> Iterator[fx.Graph]:
    for child in module.modules():
        graph = getattr(child, "graph", None)
        if isinstance(graph, fx.Graph):
            yield graph


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules()) and not isinstance(module, nn.Linear)


def _input(submodule: nn.Module, call: fx.Node) -> tuple[fx.Node, int]:
    """Return the block's node that the unit's first linears read, and its width."""
    graph = getattr(submodule, "graph", None)
    if not isinstance(graph, fx.Graph):
        raise _NoMatch("it was captured without a graph of its own")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    read: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(linear := submodule.get_submodule(str(node.target)), nn.Linear):
            source = node.args[0]
            if isinstance(source, fx.Node) and source.op == "placeholder":
                read[source] = linear.in_features
    if len(read) != 1:
        names = ", ".join(f"%{node.name}" for node in read) or "none"
        raise _NoMatch(f"its linears read {len(read)} inputs ({names}); expected one normed hidden state")
    inner, width = next(iter(read.items()))
    outer = call.args[placeholders.index(inner)]
    assert isinstance(outer, fx.Node)
    return outer, width


def _check_output(submodule: nn.Module, kind: Kind, y: fx.Node, call: fx.Node, width: int) -> None:
    """Refuse a unit whose output does not have the stream's width, and attention whose output no linear makes."""
    graph = cast(fx.Graph, submodule.graph)
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if y is not call:
        result = cast("list[fx.Node]", result)[cast(int, y.args[1])]
    if isinstance(result, (list, tuple)) and len(result) == 1:
        result = result[0]
    if isinstance(result, fx.Node) and result.op == "call_function" and kind == "ffn":
        shape = list(getattr(result.meta.get("val"), "shape", []))
        if shape[2:] == [width]:  # such as the sum of several experts
            return
    if not isinstance(result, fx.Node) or result.op != "call_module":
        raise _NoMatch(f"its output is made by {getattr(result, 'target', result)}; expected a linear")
    last = submodule.get_submodule(str(result.target))
    if not isinstance(last, nn.Linear) or last.out_features != width:
        raise _NoMatch(f"its last module {result.target} does not return the width {width} of the stream")
