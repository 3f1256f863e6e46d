"""The head apart from the rest: what comes before it, and losses whose logits exist for a part of the tokens at a time.

The logits of a vocabulary of 128,256 take 0.5 MB a token in fp32, and a loss and its gradient several times that:
more than all else that a step keeps. Most passes of a conversion want no logits at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

LOGITS_AT_ONCE = 1 << 25
"""Numbers in the logits of one part: 128 MiB in fp32."""

Logits = Callable[[torch.Tensor], torch.Tensor]
PartLoss = Callable[[torch.Tensor, slice], torch.Tensor]


def split_head(graph: fx.GraphModule, *, with_cache: bool = False) -> tuple[fx.GraphModule, fx.GraphModule | None]:
    """Cut a captured model before its head; both parts share the model's modules.

    Args:
        graph: As in `irc.model.capture.Captured`.
        with_cache: Whether the body returns keys and values too.

    Returns:
        The body, with the inputs of `graph`, that returns what the head reads, [batch, tokens, d], or with the cache a
        tuple of that and of what `graph` returns beside the logits; and the head, from
        there to the logits (a factor or a soft cap behind the linear included). Where no linear makes the logits the
        body returns them, and there is no head.
    """
    output = next(iter(graph.graph.find_nodes(op="output")))
    logits, *present = cast(list[fx.Node], output.args[0])
    head = _linear_behind(graph, logits)
    body = fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op != "output":
            inside[node] = body.node_copy(node, inside.__getitem__)
    states = logits if head is None else head.all_input_nodes[0]
    body.output((inside[states], *map(inside.__getitem__, present)) if with_cache else inside[states])
    made = _made(graph, body, "Body")
    if head is None:
        return made, None
    tail = fx.Graph()
    behind = {states: tail.placeholder("states")}
    for node in graph.graph.nodes:
        if node.op != "output" and node.all_input_nodes and behind.keys() >= set(node.all_input_nodes):
            behind[node] = tail.node_copy(node, behind.__getitem__)
    tail.output(behind[logits])
    return made, _made(graph, tail, "Head")


def _made(root: fx.GraphModule, graph: fx.Graph, name: str) -> fx.GraphModule:
    """Make a module of a graph that shares what it calls with `root`, and drop what its output does not need."""
    made = fx.GraphModule(root, graph, class_name=name)
    made.graph.eliminate_dead_code()
    made.delete_all_unused_submodules()
    made.recompile()
    return made


def _linear_behind(graph: fx.GraphModule, logits: fx.Node) -> fx.Node | None:
    """Return the call of the linear that the logits come from, by nodes of one input each."""
    node = logits
    while not (node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), nn.Linear)):
        if node.op != "call_function" or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return node


def parts(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Cut tokens so that the logits of each part hold at most `LOGITS_AT_ONCE` numbers."""
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    for start in range(0, tokens, rows):
        yield slice(start, min(tokens, start + rows))


def summed_loss(states: torch.Tensor, vocabulary: int, part_loss: PartLoss) -> torch.Tensor:
    """Sum a loss over parts of the tokens; its gradient is taken part by part, so that no logits are kept for it.

    Args:
        states: What the head reads [tokens, d].
        vocabulary: Numbers in the logits of a token.
        part_loss: Returns the scalar loss of a part from its states and its place; of what it reads nothing else
            learns.
    """
    if not (torch.is_grad_enabled() and states.requires_grad):
        losses = [part_loss(states[rows], rows) for rows in parts(len(states), vocabulary)]
        return torch.stack(losses).sum()
    apply: Callable[..., torch.Tensor] = _PartByPart.apply
    return apply(states, vocabulary, part_loss)


def token_losses(logits: Logits, states: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return the cross-entropy of every token, float32 [tokens]; no gradient.

    Args:
        logits: The head.
        states: What it reads [tokens, d].
        targets: int64 [tokens].
        vocabulary: Numbers in the logits of a token.
    """
    with torch.no_grad():
        found = [
            F.cross_entropy(logits(states[rows]).float(), targets[rows], reduction="none")
            for rows in parts(len(states), vocabulary)
        ]
    return torch.cat(found)


class _PartByPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, vocabulary: int, part_loss: PartLoss) -> torch.Tensor:
        gradient = torch.empty_like(states)
        losses = []
        for rows in parts(len(states), vocabulary):
            part = states[rows].detach().requires_grad_(True)
            with torch.enable_grad():
                loss = part_loss(part, rows)
            (gradient[rows],) = torch.autograd.grad(loss, part)
            losses.append(loss.detach())
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None
