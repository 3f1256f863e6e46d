"""Runs a dense pass layer by layer: all text through one layer, then all text through the next.

The usual order, batch by batch through all layers, reads all weights for each batch and keeps the statistics of every
layer in memory. The order here needs the weights and statistics of only one layer at a time, and keeps the hidden
states of the text, [tokens, d].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from irc.model.paging import MappedPages
from irc.model.routed import RoutedForCausalLM
from passes.match import Unit

Advance = Callable[[int], None]


def layer_by_layer(
    model: RoutedForCausalLM, batches: Sequence[torch.Tensor]
) -> Iterator[tuple[tuple[Unit, ...], Callable[[Advance], None]]]:
    """Yield the layers in order, each with its units and a function that computes it for all batches.

    Call that function exactly once before you ask for the next layer. Pass it a function that takes the number of
    windows in each finished batch. After a layer, its weights leave memory if they are mapped from files. Disable
    gradients and set the mode of the model's control before you begin.

    Args:
        model: Rewritten model.
        batches: int64 [windows, length] each.

    Yields:
        The units of a layer, and the function that computes it.
    """
    blocks = outermost({unit.block for unit in model.units})
    inputs = [model.graph_inputs(batch.to(model.device)) for batch in batches]
    pages = MappedPages(model.graph.parameters())
    interpreter = _LayerwiseInterpreter(blocks, [len(batch) for batch in batches])
    for name, block, compute in interpreter.run(model.graph, "", inputs):
        yield tuple(unit for unit in model.units if _is_in(unit.block, name)), compute
        pages.release(block.parameters())


def outermost(names: set[str]) -> list[str]:
    """Return the names of the modules that are not inside another of the named modules, sorted."""
    return sorted(name for name in names if not any(other != name and _is_in(name, other) for other in names))


def _is_in(name: str, other: str) -> bool:
    return not other or name == other or name.startswith(other + ".")


class _LayerwiseInterpreter:
    """Interprets nested captured graphs for several batches at once, up to the last block.

    Args:
        blocks: Names of the blocks.
        sizes: Windows in each batch.
    """

    def __init__(self, blocks: Sequence[str], sizes: Sequence[int]) -> None:
        self._pending = set(blocks)
        self._sizes = sizes

    def run(
        self, module: nn.Module, path: str, inputs: list[list[Any]]
    ) -> Iterator[tuple[str, nn.Module, Callable[[Advance], None]]]:
        """Yield the name and module of each block, and the function that computes it.

        Args:
            module: A captured graph module.
            path: Its path in the model.
            inputs: Inputs of the module for each batch. The lists are emptied as the inputs are read.
        """
        graph = module.graph
        assert isinstance(graph, fx.Graph)
        values: list[dict[fx.Node, Any]] = [{} for _ in inputs]
        unused_after = _last_uses(graph)
        placeholders = iter(range(len(graph.nodes)))
        for node in graph.nodes:
            if node.op == "output" or not self._pending:
                return
            if node.op == "placeholder":
                index = next(placeholders)
                for known, given in zip(values, inputs, strict=True):
                    known[node], given[index] = given[index], None
                continue
            target = f"{path}.{node.target}".lstrip(".")
            inner = module.get_submodule(str(node.target)) if node.op == "call_module" else module
            if node.op == "call_module" and target in self._pending:
                yield target, inner, self._compute(node, inner, values)
                self._pending.remove(target)
            elif node.op == "call_module" and any(_is_in(block, target) for block in self._pending):
                arguments = [list(fx.node.map_arg(node.args, known.__getitem__)) for known in values]
                yield from self.run(inner, target, arguments)
            else:
                for known in values:
                    known[node] = _evaluate(module, node, known)
            for known in values:
                for unused in unused_after.get(node, ()):
                    known.pop(unused, None)

    def _compute(self, node: fx.Node, block: nn.Module, values: list[dict[fx.Node, Any]]) -> Callable[[Advance], None]:
        def compute(advance: Advance) -> None:
            for known, size in zip(values, self._sizes, strict=True):
                result = block(*fx.node.map_arg(node.args, known.__getitem__))
                known[node] = _used_results(node, result)
                advance(size)

        return compute


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return the values that no later computation reads, by the last node that uses them; outputs do not count."""
    unused_after: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            continue
        for value in (*node.all_input_nodes, node):
            if value not in seen:
                unused_after.setdefault(node, []).append(value)
                seen.add(value)
    return unused_after


def _used_results(node: fx.Node, result: Any) -> Any:
    """Return the results of a block, without those that only the graph's output reads (keys and values)."""
    if not isinstance(result, (tuple, list)):
        return result
    used = {user.args[1] for user in node.users if any(reader.op != "output" for reader in user.users)}
    return tuple(value if index in used else None for index, value in enumerate(result))


def _evaluate(module: nn.Module, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """Return the value of one node, computed from the values of its arguments."""
    if node.op == "get_attr":
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    args: Any = fx.node.map_arg(node.args, known.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, known.__getitem__)
    if node.op == "call_module":
        return module.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
