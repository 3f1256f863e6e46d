"""Passes a new input from the outermost graph down to a submodule, and a new output up from it."""

from __future__ import annotations

import operator
from typing import cast

from torch import fx, nn

from passes.base import finish


def add_input(model: fx.GraphModule, path: str, name: str) -> fx.Node:
    """Add an input to the model and to every submodule on the way to one.

    Args:
        model: Its outermost graph; each submodule on the way is called once.
        path: Path of the submodule, such as `model.layers.0.self_attn`.
        name: Name of the input.

    Returns:
        The input in the submodule's graph, the last one of each graph.
    """
    outer = _append_placeholder(model.graph, name)
    changed: list[nn.Module] = [model]
    for module, graph, call in _path_to(model, path):
        call.args = (*call.args, outer)
        outer = _append_placeholder(graph, name)
        changed.append(module)
    for module in changed:
        finish(module)
    return outer


def add_output(model: fx.GraphModule, path: str, node: fx.Node) -> fx.Node:
    """Add a node of a submodule's graph to the outputs of the submodule and of all that call it.

    Args:
        model: As in `add_input`.
        path: Path of the submodule.
        node: A node of its graph.

    Returns:
        The node that holds the value in the outermost graph, its last output.
    """
    for module, graph, call in reversed(_path_to(model, path)):
        index = _append_output(graph, node)
        finish(module)
        with call.graph.inserting_after(call):
            node = call.graph.call_function(operator.getitem, (call, index))
    _append_output(model.graph, node)
    finish(model)
    return node


def _path_to(model: fx.GraphModule, path: str) -> list[tuple[nn.Module, fx.Graph, fx.Node]]:
    """Return (submodule, its graph, its call) for each step from the outermost graph to `path`."""
    way: list[tuple[nn.Module, fx.Graph, fx.Node]] = []
    outer: nn.Module = model
    while path:
        graph = cast(fx.Graph, outer.graph)
        call = next(n for n in graph.nodes if n.op == "call_module" and f"{path}.".startswith(f"{n.target}."))
        inner = outer.get_submodule(str(call.target))
        way.append((inner, cast(fx.Graph, inner.graph), call))
        path = path[len(str(call.target)) + 1 :]
        outer = inner
    return way


def _append_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        return graph.placeholder(name)


def _append_output(graph: fx.Graph, node: fx.Node) -> int:
    """Append to the outputs of a graph that has several; return the index."""
    output = next(n for n in graph.nodes if n.op == "output")
    results = cast("tuple[fx.Node, ...]", output.args[0])
    output.args = (type(results)((*results, node)),)
    return len(results)
