"""A dense pass layer by layer: all text through one layer, then through the next.

The usual order, batch by batch through all layers, reads all weights for each batch and gathers what is asked of every
layer at once. In this order one layer's weights and one layer's statistics are in use at a time; what has to be kept
is the hidden state of the text, [tokens, d].
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
    """Give layer after layer: its units, and what computes it for all batches.

    The caller calls that exactly once before it asks for the next layer, with a function that is told the windows of
    each batch that is done. The weights of a layer that is done leave memory where they are mapped files. Call it
    without gradients and with the control's mode set.

    Args:
        model: Rewritten model.
        batches: int64 [windows, length] each.
    """
    blocks = outermost({unit.block for unit in model.units})
    inputs = [model.graph_inputs(batch.to(model.device)) for batch in batches]
    pages = MappedPages(model.graph.parameters())
    for name, block, work in _Walk(blocks, [len(batch) for batch in batches]).through(model.graph, "", inputs):
        yield tuple(unit for unit in model.units if _is_in(unit.block, name)), work
        pages.release(block.parameters())


def outermost(names: set[str]) -> list[str]:
    """Return the names of modules that lie in no other of them."""
    return sorted(name for name in names if not any(other != name and _is_in(name, other) for other in names))


def _is_in(name: str, other: str) -> bool:
    return not other or name == other or name.startswith(other + ".")


class _Walk:
    """Interprets nested captured graphs for several batches at once, up to their last block."""

    def __init__(self, blocks: Sequence[str], sizes: Sequence[int]) -> None:
        self.left = set(blocks)
        self.sizes = sizes

    def through(
        self, module: nn.Module, path: str, inputs: list[list[Any]]
    ) -> Iterator[tuple[str, nn.Module, Callable[[Advance], None]]]:
        """Give every block of a module with what computes it; `inputs` are taken over, a list for each batch."""
        graph = module.graph
        assert isinstance(graph, fx.Graph)
        values: list[dict[fx.Node, Any]] = [{} for _ in inputs]
        dies = _last_uses(graph)
        placeholders = iter(range(len(graph.nodes)))
        for node in graph.nodes:
            if node.op == "output" or not self.left:
                return
            if node.op == "placeholder":
                place = next(placeholders)
                for known, given in zip(values, inputs, strict=True):
                    known[node], given[place] = given[place], None
                continue
            target = f"{path}.{node.target}".lstrip(".")
            inner = module.get_submodule(str(node.target)) if node.op == "call_module" else module
            if node.op == "call_module" and target in self.left:
                yield target, inner, self._work(node, inner, values)
                self.left.remove(target)
            elif node.op == "call_module" and any(_is_in(block, target) for block in self.left):
                handed = [list(fx.node.map_arg(node.args, known.__getitem__)) for known in values]
                yield from self.through(inner, target, handed)
            else:
                for known in values:
                    known[node] = _computed(module, node, known)
            for known in values:
                for dead in dies.get(node, ()):
                    known.pop(dead, None)

    def _work(self, node: fx.Node, block: nn.Module, values: list[dict[fx.Node, Any]]) -> Callable[[Advance], None]:
        def work(advance: Advance) -> None:
            for known, size in zip(values, self.sizes, strict=True):
                result = block(*fx.node.map_arg(node.args, known.__getitem__))
                known[node] = _needed(node, result)
                advance(size)

        return work


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return, by the node after which they are not needed, values that only computing needs, not the output."""
    dies: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node.op != "output":
            for dead in [value for value in (*node.all_input_nodes, node) if value not in seen]:
                dies.setdefault(node, []).append(dead)
                seen.add(dead)
    return dies


def _needed(node: fx.Node, result: Any) -> Any:
    """Return a block's results without those that go nowhere but out (its keys and values)."""
    if not isinstance(result, (tuple, list)):
        return result
    onward = {user.args[1] for user in node.users if any(reader.op != "output" for reader in user.users)}
    return tuple(value if index in onward else None for index, value in enumerate(result))


def _computed(module: nn.Module, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
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
