"""Teaches the routers the cost of forecasting, before they are trained on routed text.

To first order, approximating unit u at a token changes the loss by g . (forecast - y), where g is the gradient of the
loss with respect to the unit's output y. The routers learn to predict the logarithm of the square of that change,
standardized over all tokens and units, so that one threshold fits the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import reduce
from torch import nn

from irc.model.head import language_loss
from irc.model.modules import Router, difference_of
from irc.model.routed import RoutedForCausalLM
from irc.training.loop import Objective


class TeachObjective(Objective):
    """Squared error between each router's logit difference and the standardized log cost of forecasting.

    Args:
        model: Rewritten model with fitted forecasters.
        lr: Learning rate of the routers.
        sparsity: Target share to approximate. The mean logit difference is shifted so that sampled routes roughly meet
            it.
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
        """Return the error, and the share of the variance of the costs that the routers explain.

        Args:
            windows: int64 [batch, tokens].
            step: Not used.

        Returns:
            The error, a scalar, and `explained`.
        """
        with _probing(self.model) as probes, self.model.control.using(mode="execute", tape=None):
            states = self.model.states(windows)
        targets = windows[:, 1:].flatten()
        read = states[:, :-1].flatten(0, 1)
        loss, _ = language_loss(self.model.logits, self.model.config.vocab_size, read, targets)
        gradients = torch.autograd.grad(loss, [probe.zero for probe in probes])
        changes = [
            (gradient * probe.forecast_error).sum(-1)[:, :-1] for gradient, probe in zip(gradients, probes, strict=True)
        ]
        cost = (torch.stack(changes).double().square() + 1e-12).log()
        mean = reduce(cost.mean(), "mean")  # over all processes, like the gradient later
        deviation = reduce((cost - mean).square().mean(), "mean").sqrt()
        wanted = ((cost - mean) / deviation).float() + self.shift
        difference = torch.stack([probe.difference for probe in probes])[:, :, :-1]
        error = (difference - wanted).square().mean()
        return error, {"explained": 1 - error.item()}


class _Probe(NamedTuple):
    """Tensors of one unit: a zero added to its output, the forecast's error, and the router's logit difference."""

    zero: torch.Tensor
    forecast_error: torch.Tensor
    difference: torch.Tensor


@contextmanager
def _probing(model: RoutedForCausalLM) -> Iterator[list[_Probe]]:
    """Collect a probe of each unit from a forward pass inside the `with` block."""
    probes: list[_Probe] = []

    def add_probe(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        y, forecast, logits = arguments
        zero = torch.zeros_like(output, requires_grad=True)
        probes.append(_Probe(zero, (forecast - y).detach(), difference_of(logits)))
        return output + zero

    def detach_input(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[0].detach(),)

    handles = []
    for unit in model.units:
        handles.append(model.part(unit, "mux").register_forward_hook(add_probe))
        router = model.part(unit, "router")
        assert isinstance(router, Router)
        handles.append(router.register_forward_pre_hook(detach_input))
    try:
        yield probes
    finally:
        for handle in handles:
            handle.remove()
