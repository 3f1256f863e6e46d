"""Stable text of captured graphs: one line per node, numbered by position, so that texts can be compared."""

from __future__ import annotations

import difflib
from typing import Any

from torch import fx, nn

_DROPPED_KWARGS = frozenset({"pin_memory", "layout"})


def print_graph(graph: fx.Graph) -> str:
    """Return the text of one graph.

    Nodes are numbered in order (`%3`), module calls keep their target (`self_attn`), operators lose
    their namespace (`add.Tensor`). The text does not depend on the names that capture happened to give.
    """
    names = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    return "\n".join(_line(node, names) for node in graph.nodes)


def print_model(model: nn.Module) -> str:
    """Return the texts of a captured model and of all its submodules with graphs, outermost first."""
    parts = []
    for path, module in model.named_modules():
        graph = getattr(module, "graph", None)
        if isinstance(graph, fx.Graph):
            parts.append(f"# {path or '(root)'}\n{print_graph(graph)}\n")
    return "\n".join(parts)


def unified_diff(before: str, after: str, context: int = 3) -> str:
    """Return a unified diff of two graph texts; empty when they are equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", n=context, lineterm="")
    return "\n".join(lines)


def named_lines(graph: fx.Graph) -> str:
    """Return one line per node with the nodes' own names, which insertions do not change: made for diffs."""
    names = {node: f"%{node.name}" for node in graph.nodes}
    return "\n".join(_line(node, names) for node in graph.nodes)


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0], names)}"
    if node.op == "placeholder":
        return f"{names[node]} = input"
    parts = [_argument(argument, names) for argument in node.args]
    parts += [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items() if k not in _DROPPED_KWARGS]
    if node.op == "get_attr":
        return f"{names[node]} = weight {node.target}"
    target = f"call {node.target}" if node.op == "call_module" else _operator(node.target)
    return f"{names[node]} = {target}({', '.join(parts)})"


def _operator(target: Any) -> str:
    if hasattr(target, "_schema"):
        namespace, _, name = str(target).partition(".")
        return name if namespace == "aten" else str(target).replace(".", "::", 1)
    return str(getattr(target, "__name__", target))


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, names) for item in value)}]"
    return "end" if value == 9223372036854775807 else str(value)
