"""Teaches the routers what a forecast costs, before they are trained on routed text.

Replacing unit u's output y by its forecast at one token changes the loss by about g . (forecast - y), where g is the
gradient of the loss with respect to y. If the tokens to predict are drawn from the model's own predictions, the mean
square of that change is twice KL(dense || changed), to second order (Fisher's information). So the cost of a forecast
is the logarithm of this square, a mean over several draws, over the FLOPs that skipping saves. A ridge regression of
the costs on what each router reads makes the first routers; it needs no step of gradient descent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from irc.model.head import parts
from irc.model.modules import APPROXIMATE, EXECUTE, Router
from irc.model.routed import RoutedForCausalLM
from irc.progress import Progress
from irc.training.budget import Budget
from irc.training.threshold import common_threshold

_DRAWS = 4  # of the tokens to predict; by count a further one costs half of the first, which alone is mostly noise
_RIDGE = 0.3  # relative to the mean variance of what a router reads
_UNSEEN = 5  # one batch in five first measures what the others explain


def teach_routers(
    model: RoutedForCausalLM,
    batches: Sequence[torch.Tensor],
    budget: Budget,
    seed: int,
    progress: Progress,
    sampled: bool = False,
) -> dict[str, float]:
    """Set every router to the linear function of its input that predicts the cost of a forecast best.

    Costs are standardized over all tokens and units, so that one threshold fits the whole model, and shifted so that
    routes roughly meet the target.

    Args:
        model: Rewritten model with fitted forecasters. Its routers are changed in place.
        batches: Text, int64 [windows, length] each.
        budget: What is to be skipped, and how much skipping each unit saves.
        seed: Seed of the drawn tokens.
        progress: Updated after each batch.
        sampled: Whether training begins with sampled routes; otherwise with the routes of inference.

    Returns:
        `explained`: the share of the variance of the costs that routers explain on unseen text, nan without any.
    """
    routers = [cast(Router, model.part(unit, "router")) for unit in model.units]
    statistics = [_Statistics(router.first.in_features, model.device) for router in routers]
    saved = torch.tensor([budget.weights[unit.name] for unit in model.units], dtype=torch.float64).log()
    seen = len(batches) - max(1, len(batches) // _UNSEEN)
    explained = math.nan
    unseen: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    for index, batch in enumerate(batches):
        costs, read = _costs(model, batch.to(model.device), seed * 1_000_003 + index)
        costs = costs - saved.to(costs.device)[:, None]
        if index < seen:
            _add(statistics, costs, read)
        else:
            unseen.append((costs, read))
        progress.update(index + 1)
    if seen:
        explained = _explained(_solve(statistics), statistics, unseen)
    for costs, read in unseen:
        _add(statistics, costs, read)
    solutions = _solve(statistics)
    predicted = {
        unit.name: torch.cat([read[row].double() @ weight + bias for _, read in unseen]).cpu()
        for row, (unit, (weight, bias)) in enumerate(zip(model.units, solutions, strict=True))
    }
    share = min(max(budget.sparsity, 1e-2), 1 - 1e-2)
    start = math.log((1 - share) / share) if sampled else -common_threshold(predicted, share, budget.weights)
    for router, (weight, bias), known in zip(routers, solutions, statistics, strict=True):
        _set_linear(router, weight, bias + start, known)
    progress.update(len(batches), explained=explained)
    return {"explained": explained}


@dataclass
class _Statistics:
    """Sums over the tokens that one router has read: of its input x, of the costs c, and of their products."""

    width: int
    device: torch.device
    tokens: int = 0
    x: torch.Tensor = field(init=False)
    xx: torch.Tensor = field(init=False)
    c: torch.Tensor = field(init=False)
    cc: torch.Tensor = field(init=False)
    xc: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        self.x, self.xc = (torch.zeros(self.width, **options) for _ in range(2))
        self.c, self.cc = (torch.zeros((), **options) for _ in range(2))
        # A float64 would double the largest memory of this phase: one such matrix for every unit.
        self.xx = torch.zeros(self.width, self.width, device=self.device)

    def add(self, x: torch.Tensor, costs: torch.Tensor) -> None:
        """Add tokens: x is [tokens, width], costs are float64 [tokens]."""
        x = x.float()
        self.tokens += len(x)
        with torch.autocast(x.device.type, enabled=False):
            self.xx += x.T @ x
        x = x.double()
        self.x += x.sum(0)
        self.xc += x.T @ costs
        self.c += costs.sum()
        self.cc += costs.square().sum()


def _add(statistics: Sequence[_Statistics], costs: torch.Tensor, read: Sequence[torch.Tensor]) -> None:
    for known, x, c in zip(statistics, read, costs, strict=True):
        known.add(x, c)


def _scale(statistics: Sequence[_Statistics]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the costs of all units."""
    tokens = sum(known.tokens for known in statistics)
    mean = torch.stack([known.c for known in statistics]).sum() / tokens
    square = torch.stack([known.cc for known in statistics]).sum() / tokens
    return mean, (square - mean.square()).clamp(min=1e-12).sqrt()


def _solve(statistics: Sequence[_Statistics]) -> list[tuple[torch.Tensor, float]]:
    """Return weight [width] and bias of the ridge regression of the standardized costs, for every router."""
    mean, deviation = _scale(statistics)
    solutions = []
    for known in statistics:
        x, c = known.x / known.tokens, (known.c / known.tokens - mean) / deviation
        covariance = known.xx.double() / known.tokens - torch.outer(x, x)
        with_cost = (known.xc / known.tokens - x * mean) / deviation - x * c
        damping = _RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
        covariance.diagonal().add_(damping)
        weight = torch.linalg.solve(covariance, with_cost)
        solutions.append((weight, (c - weight @ x).item()))
    return solutions


def _explained(
    solutions: Sequence[tuple[torch.Tensor, float]],
    statistics: Sequence[_Statistics],
    unseen: Sequence[tuple[torch.Tensor, list[torch.Tensor]]],
) -> float:
    """Return the share of the variance of unseen costs that the solutions explain."""
    mean, deviation = _scale(statistics)
    errors: list[float] = []
    for costs, read in unseen:
        for (weight, bias), x, c in zip(solutions, read, costs, strict=True):
            errors.append(((x.double() @ weight + bias - (c - mean) / deviation).square().mean()).item())
    return 1.0 - sum(errors) / len(errors)


@torch.no_grad()
def _set_linear(router: Router, weight: torch.Tensor, bias: float, known: _Statistics) -> None:
    """Let a router's logit difference be weight . x + bias, by two of its hidden units: relu(z) - relu(-z) is z.

    The output weights of its other hidden units become zero, so that they add nothing before they are trained.
    """
    first, last = router.first, router.last
    spread = ((weight @ known.xx.double() @ weight) / known.tokens).sqrt().clamp(min=1e-6)
    first.weight[0].copy_(weight / spread)
    first.weight[1].copy_(-weight / spread)
    first.bias[:2] = 0
    last.weight.zero_()
    last.bias.zero_()
    for hidden, sign in ((0, 0.5), (1, -0.5)):
        last.weight[EXECUTE, hidden] = sign * spread
        last.weight[APPROXIMATE, hidden] = -sign * spread
    last.bias[EXECUTE] = bias


def _costs(model: RoutedForCausalLM, batch: torch.Tensor, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logarithm of what each forecast costs, and what each router read.

    The last token of a window predicts nothing that is known, and is left out.

    Args:
        model: Rewritten model.
        batch: int64 [windows, length].
        seed: Seed of the draws.

    Returns:
        Costs, float64 [units, tokens], and for every unit [tokens, width].
    """
    with torch.enable_grad(), _probing(model) as probes, model.control.using(mode="execute", tape=None):
        states = model.states(batch)
        read = states[:, :-1].flatten(0, 1)
        changes = torch.zeros(len(probes), len(read), dtype=torch.float64, device=batch.device)
        for draw, upstream in enumerate(_gradients(model, read.detach(), seed)):
            zeros = [probe.zero for probe in probes]
            gradients = torch.autograd.grad(read, zeros, upstream, retain_graph=draw < _DRAWS - 1)
            for row, gradient, probe in zip(changes, gradients, probes, strict=True):
                row += (gradient * probe.forecast_error).sum(-1)[:, :-1].flatten().double().square()
    costs = (changes / _DRAWS + 1e-12).log()
    return costs, [probe.read[:, :-1].flatten(0, 1) for probe in probes]


def _gradients(model: RoutedForCausalLM, states: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Draw the next token of each state several times; return the gradient of each draw's cross-entropy in the states.

    That gradient is the one of the expected logit less the one of the drawn token's logit. All draws share the former.

    Args:
        model: Its head is used.
        states: What the head reads [tokens, d].
        seed: Seed of the draws.

    Returns:
        [tokens, d] for each draw.
    """
    generator = torch.Generator(states.device).manual_seed(seed)
    found = [torch.empty_like(states) for _ in range(_DRAWS)]
    for rows in parts(states, model.config.vocab_size):
        part = states[rows].detach().requires_grad_(True)
        logits = model.logits(part)
        probabilities = logits.detach().float().softmax(-1)
        tokens = torch.multinomial(probabilities, _DRAWS, replacement=True, generator=generator)
        (expected,) = torch.autograd.grad(logits, part, probabilities.to(logits.dtype), retain_graph=True)
        for draw, gradients in enumerate(found):
            drawn = logits.gather(-1, tokens[:, draw, None]).sum()
            (own,) = torch.autograd.grad(drawn, part, retain_graph=draw < _DRAWS - 1)
            gradients[rows] = expected - own
    return found


class _Probe(NamedTuple):
    """Tensors of one unit: a zero added to its output, the forecast's error, and what the router read."""

    zero: torch.Tensor
    forecast_error: torch.Tensor
    read: torch.Tensor


@contextmanager
def _probing(model: RoutedForCausalLM) -> Iterator[list[_Probe]]:
    """Collect a probe of each unit from a forward pass inside the `with` block."""
    probes: list[_Probe] = []
    inputs: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Any:
        def hook(router: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            assert isinstance(router, Router)
            inputs[name] = router.features(arguments[0].detach()).detach()

        return hook

    def add_probe(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            y, forecast, *_rest = arguments
            zero = torch.zeros_like(output, requires_grad=True)
            probes.append(_Probe(zero, (forecast - y).detach(), inputs.pop(name)))
            return output + zero

        return hook

    handles = []
    for unit in model.units:
        handles.append(model.part(unit, "router").register_forward_pre_hook(remember(unit.name)))
        handles.append(model.part(unit, "mux").register_forward_hook(add_probe(unit.name)))
    try:
        yield probes
    finally:
        for handle in handles:
            handle.remove()
