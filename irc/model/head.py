"""Separates the language-model head from the body, and computes losses with the logits of a few tokens at a time.

With a vocabulary of 128,256, logits take 0.5 MB per token in fp32, and a loss with its gradient several times that:
more than everything else that a training step keeps. Most forward passes of a conversion need no logits at all.
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
        The body and the head. The body takes the inputs of `graph` and returns the hidden states that the head reads,
        [batch, tokens, d]; with `with_cache`, a tuple of these and everything else that `graph` returns. The head
        computes the logits from them, including a factor or a soft cap after the linear. If no linear computes the
        logits, the body returns them and the head is None.
    """
    output = next(iter(graph.graph.find_nodes(op="output")))
    logits, *present = cast(list[fx.Node], output.args[0])
    head = _linear_before(graph, logits)
    body = fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op != "output":
            inside[node] = body.node_copy(node, inside.__getitem__)
    states = logits if head is None else head.all_input_nodes[0]
    body.output((inside[states], *map(inside.__getitem__, present)) if with_cache else inside[states])
    made = _module_of(graph, body, "Body")
    if head is None:
        return made, None
    tail = fx.Graph()
    behind = {states: tail.placeholder("states")}
    for node in graph.graph.nodes:
        if node.op != "output" and node.all_input_nodes and behind.keys() >= set(node.all_input_nodes):
            behind[node] = tail.node_copy(node, behind.__getitem__)
    tail.output(behind[logits])
    return made, _module_of(graph, tail, "Head")


def _module_of(root: fx.GraphModule, graph: fx.Graph, name: str) -> fx.GraphModule:
    """Return a module of a graph that shares submodules with `root`, without nodes that its output does not need."""
    module = fx.GraphModule(root, graph, class_name=name)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _linear_before(graph: fx.GraphModule, logits: fx.Node) -> fx.Node | None:
    """Return the call of the linear that computes the logits, or None; only nodes with one input may follow it."""
    node = logits
    while not (node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), nn.Linear)):
        if node.op != "call_function" or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return node


def parts(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices of the tokens whose logits hold at most `LOGITS_AT_ONCE` numbers each."""
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    for start in range(0, tokens, rows):
        yield slice(start, min(tokens, start + rows))


def summed_loss(states: torch.Tensor, vocabulary: int, part_loss: PartLoss) -> torch.Tensor:
    """Sum a loss over parts of the tokens. The gradient is computed part by part, so no logits are kept for it.

    Args:
        states: Hidden states that the head reads [tokens, d].
        vocabulary: Size of the vocabulary.
        part_loss: Returns the scalar loss of a part, given its states and its slice of the tokens. Gradients reach the
            states alone.
    """
    if not (torch.is_grad_enabled() and states.requires_grad):
        losses = [part_loss(states[rows], rows) for rows in parts(len(states), vocabulary)]
        return torch.stack(losses).sum()
    apply: Callable[..., torch.Tensor] = _PartByPart.apply
    return apply(states, vocabulary, part_loss)


@torch.no_grad()
def divergence(dense: torch.Tensor, routed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the predictions of two models for the same tokens.

    Args:
        dense: Logits of the reference [tokens, vocabulary].
        routed: Logits of the other model, of the same shape.

    Returns:
        KL(dense || routed) in nats, float32 [tokens], and whether both find the same token likeliest, bool [tokens].
    """
    reference, other = F.log_softmax(dense.float(), -1), F.log_softmax(routed.float(), -1)
    found = F.kl_div(other, reference, reduction="none", log_target=True).sum(-1)
    return found.clamp(min=0), dense.argmax(-1) == routed.argmax(-1)


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
