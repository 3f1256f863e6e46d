"""Teaches routers what a forecast would cost, before they are trained by routing.

To first order, approximating unit u at a token changes the loss by g . (forecast - y), where g is the loss's
gradient with respect to the unit's output y. The routers learn to predict the logarithm of its square, in
units of its standard deviation over all tokens and units, so that one threshold serves the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import nn

from irc.model.head import summed_loss
from irc.model.modules import Router, difference_of
from irc.model.routed import RoutedForCausalLM
from irc.training.loop import Objective


class TeachObjective(Objective):
    """Squared error between every router's logit difference and the standardised log cost of forecasting.

    Args:
        model: Rewritten model with fitted forecasters.
        lr: Learning rate of the routers.
        sparsity: Target share to approximate: what the differences' mean is shifted to, so that routes that are
            sampled by them meet it about.
    """

    def __init__(self, model: RoutedForCausalLM, lr: float, sparsity: float) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        share = min(max(sparsity, 1e-2), 1 - 1e-2)
        self.shift = math.log((1 - share) / share)

    def trainable(self) -> list[dict[str, Any]]:
        """All routers."""
        return [{"params": self.model.adapter_parameters("router"), "lr": self.lr}]

    def forward(self, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the error, and the share of the costs' variance that the routers explain.

        Args:
            windows: int64 [batch, tokens].
            step: Not used.
        """
        with _probing(self.model) as seen, self.model.control.using(mode="execute", tape=None):
            states = self.model.states(windows)
        targets = windows[:, 1:].flatten()

        def part_loss(part: torch.Tensor, rows: slice) -> torch.Tensor:
            return F.cross_entropy(self.model.logits(part).float(), targets[rows], reduction="sum")

        loss = summed_loss(states[:, :-1].flatten(0, 1), self.model.config.vocab_size, part_loss)
        gradients = torch.autograd.grad(loss, [probe for probe, _, _ in seen])
        errors = [(g * error).sum(-1)[:, :-1] for g, (_, error, _) in zip(gradients, seen, strict=True)]
        cost = (torch.stack(errors).double().square() + 1e-12).log()
        mean = reduce(cost.mean(), "mean")  # of all processes, as the gradient will be
        spread = reduce((cost - mean).square().mean(), "mean").sqrt()
        wanted = ((cost - mean) / spread).float() + self.shift
        difference = torch.stack([logits for _, _, logits in seen])[:, :, :-1]
        error = (difference - wanted).square().mean()
        return error, {"explained": 1 - error.item()}


@contextmanager
def _probing(model: RoutedForCausalLM) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Gather of every unit a zero added to its output, its forecast's error, and its router's difference."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def probe(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        y, forecast, logits = arguments
        zero = torch.zeros_like(output, requires_grad=True)
        seen.append((zero, (forecast - y).detach(), difference_of(logits)))
        return output + zero

    def apart(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[0].detach(),)

    handles = []
    for unit in model.units:
        handles.append(model.part(unit, "mux").register_forward_hook(probe))
        router = model.part(unit, "router")
        assert isinstance(router, Router)
        handles.append(router.register_forward_pre_hook(apart))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
