"""Teaches the routers what a forecast costs, before they are trained on routed text.

To second order, replacing unit u's output y by its forecast at one token costs KL(dense || changed) = e'Fe / 2, where e
is the forecast's error and F is Fisher's information of the predictions, taken back to y. Random signs, multiplied by a
root of F, give a gradient g with E[(g . e)^2] = e'Fe. So the cost of a forecast is this square, a mean over a few draws
of signs, over the FLOPs that skipping saves. Each router starts as a linear function of what it reads that predicts the
logarithm of the expected cost: a gamma regression with a logarithmic link (McCullagh and Nelder, Generalized Linear
Models, chapter 8). Costs have long tails: the mean of their logarithms would underrate tokens that are cheap most of
the time and very expensive now and then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from irc.errors import IrcError
from irc.model.head import parts
from irc.model.modules import APPROXIMATE, EXECUTE, Router
from irc.model.routed import RoutedForCausalLM
from irc.progress import Progress
from irc.training.budget import Budget
from irc.training.threshold import common_threshold, log_odds

_DRAWS = 2  # of random signs; the second halves the noise for one more backward pass
_RIDGE = 0.3  # relative to the mean variance of what a router reads
_ITERATIONS = 30  # of the regression; 8 to 15 are usual
_CONVERGED = 1e-4  # what the next step could improve the objective by, to first order
_SUFFICIENT = 0.1  # part of that which a step must bring, otherwise it is halved
_SMALLEST = 1e-6  # part of a step


def teach_routers(
    model: RoutedForCausalLM,
    batches: Sequence[torch.Tensor],
    budget: Budget,
    seed: int,
    progress: Progress,
    sampled: bool = False,
) -> None:
    """Set every router to the linear function of its input that predicts the logarithm of the expected cost best.

    What they predict is centred, divided by the standard deviation of the logarithms of all costs, and shifted so that
    routes roughly meet the target. One threshold fits the whole model.

    Args:
        model: Rewritten model with fitted forecasters. Its routers are changed in place.
        batches: Text, int64 [windows, length] each. What all routers read of it is kept, two bytes for every number.
        budget: What is to be skipped, and how much skipping each unit saves.
        seed: Seed of the random signs.
        progress: Updated after each batch, and at the end.
        sampled: Whether training begins with sampled routes; otherwise with the routes of inference.

    Raises:
        IrcError: A gradient is not finite.
    """
    saved = torch.tensor([budget.weights[unit.name] for unit in model.units], dtype=torch.float64).log()
    found: list[torch.Tensor] = []
    read: list[list[torch.Tensor]] = []
    for index, batch in enumerate(batches):
        costs, inputs = _costs(model, batch.to(model.device), seed * 1_000_003 + index)
        # A GPU has no room for what all routers read; bf16 adds an error of at most 0.4 % to each number.
        found.append(costs.cpu() - saved[:, None])
        read.append([x.to("cpu", torch.bfloat16) for x in inputs])
        del inputs
        progress.update(index + 1)
    logarithms = torch.cat(found, dim=1)
    solutions, products = [], []
    for row, unit in enumerate(model.units):
        if not bool(logarithms[row].isfinite().all()):
            raise IrcError(
                f"the gradients at {unit.name} are not finite numbers: look for damaged weights, or set precision=fp32"
            )
        x = torch.cat([part[row] for part in read]).to(model.device, torch.float64)
        weight, bias = expected_cost(x, logarithms[row].to(model.device))
        solutions.append((weight, bias))
        products.append((x @ weight).cpu())
    predicted = torch.stack(products) + torch.tensor([[bias] for _, bias in solutions], dtype=torch.float64)
    mean, deviation = predicted.mean().item(), logarithms.std(correction=0).clamp(min=1e-6).item()
    differences = {unit.name: (row - mean) / deviation for unit, row in zip(model.units, predicted, strict=True)}
    share = min(max(budget.sparsity, 1e-2), 1 - 1e-2)
    start = log_odds(1 - share) if sampled else -common_threshold(differences, share, budget.weights)
    for unit, (weight, bias), product in zip(model.units, solutions, products, strict=True):
        spread = product.square().mean().sqrt().item() / deviation
        router = cast(Router, model.part(unit, "router"))
        _set_linear(router, weight / deviation, (bias - mean) / deviation + start, max(spread, 1e-6))
    progress.update(len(batches) + 1)


@torch.no_grad()
def expected_cost(x: torch.Tensor, logarithms: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Fit the logarithm of the expected cost, weight . x + bias, by Fisher scoring.

    It minimizes half the mean gamma deviance, exp(r) - r - 1 of the residuals r, and the ridge, which is convex.
    Fisher's information is the covariance of x whatever the costs are, so that one factorization serves all iterations.

    Args:
        x: What a router reads, float64 [tokens, width].
        logarithms: Logarithms of the costs, float64 [tokens].

    Returns:
        Weight, float64 [width], and bias.
    """
    mean = x.mean(0)
    centred = x - mean
    information = centred.T @ centred / len(x)
    ridge = _RIDGE * information.diagonal().mean().clamp(min=1e-12)
    information.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(information)

    def residual(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return logarithms - centred @ weight - bias

    def objective(weight: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        return (left.exp() - left - 1).mean() + ridge / 2 * weight.square().sum()

    weight = torch.zeros_like(mean)
    bias = logarithms.logsumexp(0) - math.log(len(x))
    left = residual(weight, bias)
    best = objective(weight, left)
    for _ in range(_ITERATIONS):
        score = left.exp() - 1
        slope, shift = centred.T @ score / len(x) - ridge * weight, score.mean()
        step = torch.cholesky_solve(slope[:, None], factor)[:, 0]
        gain = slope @ step + shift.square()
        if gain <= _CONVERGED:
            break
        size = 1.0
        while size > _SMALLEST:
            left = residual(weight + size * step, bias + size * shift)
            reached = objective(weight + size * step, left)
            if reached <= best - _SUFFICIENT * size * gain:
                break
            size /= 2
        else:
            break
        weight, bias, best = weight + size * step, bias + size * shift, reached
    return weight, (bias - mean @ weight).item()


@torch.no_grad()
def _set_linear(router: Router, weight: torch.Tensor, bias: float, spread: float) -> None:
    """Let a router's logit difference be weight . x + bias, by two of its hidden units: relu(z) - relu(-z) is z.

    The output weights of its other hidden units become zero, so that they add nothing before they are trained. The
    spread, the root mean square of weight . x, scales the hidden units to 1.
    """
    first, last = router.first, router.last
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
    """Return the logarithm of twice the KL that each forecast costs, and what each router read.

    The last token of a window is left out, as in losses.

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
    """Multiply random signs by a root of Fisher's information of the predictions, and take them back to the states.

    With probabilities p and signs r, the vector z = sqrt(p) r - p (sqrt(p) . r) has the covariance diag(p) - pp', which
    is Fisher's information in the logits. Tokens drawn from p have it too, but a token that the model is sure of would
    hardly ever draw anything else.

    Args:
        model: Its head is used.
        states: What the head reads [tokens, d].
        seed: Seed of the signs.

    Returns:
        [tokens, d] for each draw.
    """
    generator = torch.Generator(states.device).manual_seed(seed)
    found = [torch.empty_like(states) for _ in range(_DRAWS)]
    for rows in parts(states, model.config.vocab_size):
        part = states[rows].detach().requires_grad_(True)
        logits = model.logits(part)
        probabilities = logits.detach().float().softmax(-1)
        root = probabilities.sqrt()
        for draw, gradients in enumerate(found):
            upstream = torch.empty_like(root).bernoulli_(0.5, generator=generator).mul_(2).sub_(1).mul_(root)
            upstream -= probabilities * upstream.sum(-1, keepdim=True)
            more = draw < _DRAWS - 1
            (gradients[rows],) = torch.autograd.grad(logits, part, upstream.to(logits.dtype), retain_graph=more)
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
