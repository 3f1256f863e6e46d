"""Tells products which of their rows are tokens, so that on CUDA the number of rows need not reach the host."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx, nn

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import Pass, PassResult, finish, graph_of, transposed_weight
from passes.name_modules import PART

aten, irc = torch.ops.aten, torch.ops.irc

MOST = 32
"""Tokens of a step: more than are decoded at once, yet so few that reading weights takes longer than multiplying."""
_CHOICES = (irc.decide_rows.default, irc.select_rows.default)
_SCATTERS = (irc.scatter.default, irc.scatter_add.default)
# Operators whose CUDA kernels skip rows (-1, -1).
_TAKE_PADDED_ROWS = frozenset(
    {
        irc.compact.default,
        *_SCATTERS,
        irc.forecast_add.default,
        irc.routed_matmul.default,
        irc.routed_attention.default,
    }
)


class RouteProducts(Pass):
    """Replaces linears on chosen rows by `irc::routed_matmul`, and has the choice of those rows pad them.

    Run after every pass that makes rows. A choice stays as it is if an operator that does not accept padded rows reads
    them, such as `irc::reduced_attention`, or if experts are chosen for its rows, since padding chooses no expert.

    Args:
        most: Rows are padded where there are at most this many tokens.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most

    def call(self, model: fx.GraphModule) -> PassResult:
        """Rewrite every choice that can be padded, and the products on its rows."""
        modified = False
        for module in list(model.modules()):
            choices = [node for node in getattr(graph_of(module), "nodes", ()) if node.target in _CHOICES]
            for choice in (node for node in choices if len(node.args) == 1):
                parts = [_part(module, rows, frozenset()) for rows in choice.users]
                if None in parts:
                    continue
                choice.args = (choice.args[0], self.most)
                for part in cast("list[_Part]", parts):
                    _rewrite(part)
                finish(module)
                modified = True
        return PassResult(model, modified)


@dataclass
class _Part:
    """What a graph computes on chosen rows, each row separately, as LowerUnits made it.

    Attributes:
        module: Whose graph it is.
        rows: The node that holds the rows, None where they are not an input of the graph.
        on: Nodes that hold one value per row; with an index, one of several results.
        linears: Calls of linears among them.
        inner: Calls of submodules that have such a part too.
    """

    module: nn.Module
    rows: fx.Node | None
    on: set[fx.Node | tuple[fx.Node, int]]
    linears: list[fx.Node] = field(default_factory=list)
    inner: list[tuple[fx.Node, _Part]] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        return cast(fx.Graph, self.module.graph)

    def has_linears(self) -> bool:
        return bool(self.linears) or any(part.has_linears() for _, part in self.inner)


def _part(module: nn.Module, rows: fx.Node | None, given: frozenset[fx.Node]) -> _Part | None:
    """Follow rows, and values on them, through a graph; None if an operator that cannot take padded rows reads them."""
    part = _Part(module, rows, set(given))
    for node in part.graph.nodes:
        takes, on = rows in node.all_input_nodes, any(source in part.on for source in node.all_input_nodes)
        if node.op == "call_module" and (takes or on):
            if not _enter(part, node):
                return None
        elif takes and node.target not in _TAKE_PADDED_ROWS:
            return None
        elif takes and node.target == irc.routed_attention.default:
            part.on.add((node, 0))
        elif node.target is operator.getitem:
            if on or (node.args[0], node.args[1]) in part.on:
                part.on.add(node)
        elif on and node.target in _CHOICES:
            return None
        elif (on or (takes and node.target == irc.compact.default)) and not (takes and node.target in _SCATTERS):
            part.on.add(node)
    return part


def _enter(part: _Part, call: fx.Node) -> bool:
    """Follow rows into a submodule that is called once; return whether it accepts padded rows."""
    inner = part.module.get_submodule(str(call.target))
    graph = graph_of(inner)
    if graph is None:  # a linear, an activation, a forecaster
        part.on.add(call)
        part.linears += [call] if isinstance(inner, nn.Linear) else []
        return True
    if sum(node.op == "call_module" and node.target == call.target for node in part.graph.nodes) > 1:
        return False
    inputs = dict(zip((n for n in graph.nodes if n.op == "placeholder"), call.args, strict=True))
    given = frozenset(node for node, argument in inputs.items() if argument in part.on)
    found = _part(inner, next((node for node, argument in inputs.items() if argument is part.rows), None), given)
    if found is None:
        return False
    part.inner.append((call, found))
    results = next(node for node in graph.nodes if node.op == "output").args[0]
    if isinstance(results, (list, tuple)):
        part.on |= {(call, index) for index, result in enumerate(results) if result in found.on}
        if len(results) == 1 and results[0] in found.on:  # the caller may read it without an index
            part.on.add(call)
    elif results in found.on:
        part.on.add(call)
    return True


def _rewrite(part: _Part) -> None:
    for call, inner in part.inner:
        if inner.rows is None and inner.has_linears():
            last = [node for node in inner.graph.nodes if node.op == "placeholder"][-1]
            with inner.graph.inserting_after(last):
                inner.rows = inner.graph.placeholder("rows")
            call.args = (*call.args, part.rows)
        _rewrite(inner)
    for linear in part.linears:
        _multiply(part, linear)
    finish(part.module)


def _multiply(part: _Part, call: fx.Node) -> None:
    graph, target, name = part.graph, str(call.target), call.name
    with graph.inserting_before(call):
        args = call.args[0], part.rows, transposed_weight(graph, target)
        product = graph.call_function(irc.routed_matmul.default, args)
        product.meta[PART] = target
        if part.module.get_submodule(target).bias is not None:
            product = graph.call_function(aten.add.Tensor, (product, graph.get_attr(f"{target}.bias")))
            product.meta[PART] = target
    product.meta["val"] = call.meta.get("val")
    call.replace_all_uses_with(product)
    graph.erase_node(call)
    product._rename(name)
