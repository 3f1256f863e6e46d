"""Separates the language-model head from the body, and computes losses with the logits of a few tokens at a time.

With a vocabulary of 128,256, logits take 0.5 MB per token in fp32, and a loss with its gradient several times that:
more than everything else that a training step keeps. Most forward passes of a conversion need no logits at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

LOGITS_AT_ONCE = {"cpu": 1 << 24, "other": 1 << 25}
"""Numbers in the logits of one part, by kind of device: 64 MiB in fp32 on a CPU, 128 MiB on a GPU."""

Head = Callable[[torch.Tensor], torch.Tensor]
PartLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


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


def parts(states: torch.Tensor, vocabulary: int) -> Iterator[slice]:
    """Yield slices of the tokens [tokens, ...] whose logits hold at most `LOGITS_AT_ONCE` numbers each."""
    tokens, at_once = len(states), LOGITS_AT_ONCE["cpu" if states.device.type == "cpu" else "other"]
    rows = max(1, at_once // vocabulary)
    for start in range(0, tokens, rows):
        yield slice(start, min(tokens, start + rows))


def language_loss(
    head: Head,
    vocabulary: int,
    states: torch.Tensor,
    targets: torch.Tensor,
    teacher: torch.Tensor | None = None,
    share: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the language-model loss over tokens, a part of them at a time. No logits are kept for the backward pass.

    Args:
        head: Maps states to logits (see `split_head`).
        vocabulary: Size of the vocabulary.
        states: Hidden states that the head reads [tokens, d]. Gradients reach them alone, not the head's weights.
        targets: The tokens to predict, int64 [tokens].
        teacher: Hidden states of the dense model [tokens, d]; None for the cross-entropy alone.
        share: Share of KL(dense || routed) in the loss, where there is a teacher.

    Returns:
        The sum of (1 - share) * cross-entropy + share * KL in nats, and the plain cross-entropy without gradient.
    """
    part_loss = partial(_part_loss, head, targets, teacher, 0.0 if teacher is None else share)
    if torch.is_grad_enabled() and states.requires_grad:
        apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _PartByPart.apply
        return apply(states, vocabulary, head, part_loss)
    found = [part_loss(head(states[rows]), rows) for rows in parts(states, vocabulary)]
    return torch.stack([loss for loss, _, _ in found]).sum(), torch.stack([plain for _, plain, _ in found]).sum()


@torch.no_grad()
def _part_loss(
    head: Head, targets: torch.Tensor, teacher: torch.Tensor | None, share: float, logits: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of a part, its plain cross-entropy, and the gradient of the loss in the logits.

    The gradient is softmax(logits) minus the wanted distribution: written down, it needs one pass over the logits where
    automatic differentiation needs four.
    """
    predicted, wanted = log_probabilities(logits), targets[rows, None]
    plain = loss = -predicted.gather(-1, wanted).sum()
    if teacher is None:
        gradient = predicted.exp_()
    else:
        dense = log_probabilities(head(teacher[rows]))
        probabilities = dense.exp()
        loss = (1 - share) * plain + share * dense.sub_(predicted).mul_(probabilities).sum()
        gradient = predicted.exp_().sub_(probabilities, alpha=share)
    gradient.scatter_add_(-1, wanted, gradient.new_full(wanted.shape, share - 1))
    return loss, plain, gradient


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the probabilities of all tokens, float32, in the shape of the logits."""
    return F.log_softmax(logits, -1, dtype=torch.float32)


@torch.no_grad()
def divergence(dense: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """Return KL(dense || routed) in nats, float32 [tokens], of logarithms of probabilities [tokens, vocabulary].

    Both may be overwritten.
    """
    probabilities = dense.exp()
    return dense.sub_(routed).mul_(probabilities).sum(-1).clamp_(min=0)


class _PartByPart(torch.autograd.Function):
    """`language_loss` with the gradient of each part computed along with it."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, vocabulary: int, head: Head, part_loss: PartLoss
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = torch.empty_like(states)
        losses, plain_losses = [], []
        for rows in parts(states, vocabulary):
            part = states[rows].detach().requires_grad_(True)
            with torch.enable_grad():
                logits = head(part)
            loss, plain, upstream = part_loss(logits.detach(), rows)
            (gradient[rows],) = torch.autograd.grad(logits, part, upstream.to(logits.dtype))
            losses.append(loss)
            plain_losses.append(plain)
        ctx.save_for_backward(gradient)
        found = torch.stack(losses).sum(), torch.stack(plain_losses).sum()
        ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None
