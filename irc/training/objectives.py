"""The losses of the stages, as modules that `irc.training.loop` trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather, reduce

from irc.model.head import language_loss
from irc.model.modules import Record, Router
from irc.model.routed import RoutedForCausalLM
from irc.recipe.policies import policy_named
from irc.recipe.stages import RouterRecipe
from irc.training.budget import Budget
from irc.training.loop import Objective, step_noise
from irc.training.lora import adapters_off
from irc.training.threshold import common_threshold

Figures = dict[str, float]

_FOLLOW = 0.3  # part of the way that the threshold goes in a step


class ForecastObjective(Objective):
    """Loss of stage `lff`: L1 + (1 - cosine) between each forecaster and its unit, with every unit executed.

    Args:
        model: Rewritten model.
        lr: Learning rate of the forecasters.
    """

    through_layers = False

    def __init__(self, model: RoutedForCausalLM, lr: float) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    def trainable(self) -> list[dict[str, Any]]:
        """All forecasters."""
        return [{"params": self.model.adapter_parameters("forecaster"), "lr": self.lr}]

    def forward(self, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, Figures]:
        """Return the loss and the mean cosine.

        Args:
            windows: int64 [batch, tokens].
            step: Not used.

        Returns:
            The loss, summed over the units and averaged over the tokens, and `cosine`.
        """
        tape: dict[str, Record] = {}
        with self.model.control.using(mode="execute", tape=tape, measure_error=True):
            self.model.states(windows)
        l1 = torch.stack([_recorded(record.l1).mean() for record in tape.values()])
        cosine = torch.stack([_recorded(record.cosine).mean() for record in tape.values()])
        return (l1 + 1 - cosine).sum(), {"cosine": cosine.mean().item()}


class RoutingObjective(Objective):
    """Loss of stages `router` and `lora`: language-model loss, sparsity target, and cosine error of skipped tokens.

    Training moves the hidden states that routers read, and with them the share that is skipped. With the routes of
    inference a threshold follows, so that every step skips the target's share and forecasters learn on the routes that
    they are for. Executing then has a price, the KL of the last steps over the share that they skipped, so that
    skipping is worth about what it costs. Its gradient reaches routers that learn, and through what routers read also
    the units before them. Without it, the KL's own gradient through the gates would make states that ask for more
    execution.

    Args:
        model: Rewritten model.
        recipe: Weights, learning rates and temperatures of the router stage.
        budget: How much to skip, and where.
        seed: Seed of the sampling noise.
        steps: Length of the stage, for the temperature.
        lora: Parameter groups that stage `lora` trains instead; the temperature then stays at its final value.
        sampled: Whether routers learn in stage `lora` too. Unless they were taught, its routes are then sampled.
    """

    def __init__(
        self,
        model: RoutedForCausalLM,
        recipe: RouterRecipe,
        budget: Budget,
        seed: int,
        steps: int,
        lora: Sequence[dict[str, Any]] = (),
        sampled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe.settled()
        self.budget = budget
        self.seed = seed
        self.steps = steps
        policy = policy_named(model.spec.policy if model.spec else "informed")
        assert self.recipe.lr is not None
        self.lora = list(lora)
        self.sampled = policy.learns and (sampled if lora else self.recipe.lr > 0)
        self._learns, self._ranked = policy.learns, policy.capacity
        self._random = not (policy.learns or policy.whole_units)
        self._cosine_weight = recipe.cosine_weight if policy.forecasts else 0.0
        self._held = policy.learns and not self._ranked and self.recipe.noise == 0
        self._threshold = 0.0  # of the logit difference
        self._price: float | None = None  # of executing everything, in nats

    def trainable(self) -> list[dict[str, Any]]:
        """The routers, and the forecasters if they keep learning; or the parameter groups of stage `lora`."""
        if self.lora:
            return self.lora
        assert self.recipe.lr is not None
        # Routers that stay as they were taught are here too, without gradients: a checkpoint has to hold them.
        groups = [{"params": self.model.adapter_parameters("router"), "lr": self.recipe.lr}] if self._learns else []
        if self.recipe.forecaster_lr > 0:
            groups.append({"params": self.model.adapter_parameters("forecaster"), "lr": self.recipe.forecaster_lr})
        return groups

    def temperature(self, step: int) -> float:
        """Return the temperature of the gate at a step."""
        start, end = self.recipe.temperature_start, self.recipe.temperature_end
        assert start is not None
        return end if self.lora else start + (end - start) * step / max(1, self.steps - 1)

    def forward(self, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, Figures]:
        """Return the loss and its parts.

        Args:
            windows: int64 [batch, tokens], without padding.
            step: Step of the loop, which decides the noise and the temperature.

        Returns:
            The loss, and `lm` (the language-model loss) and `sparsity`.
        """
        tape: dict[str, Record] = {}
        control = self.model.control
        with control.using(tape=tape, measure_error=self._cosine_weight > 0, **self._routing(windows, step)):
            states = self.model.states(windows)
        loss, plain, divergence = self._language_loss(states, windows)
        figures = {"lm": plain}
        execution = {unit: _straight_through(record) for unit, record in tape.items()}
        weight = self.recipe.sparsity_weight
        assert weight is not None
        if self._held:
            self._follow(tape)
            loss = loss + weight * self._follow_price(divergence) * self.budget.cost(execution)
        elif self.sampled and not self._ranked:
            loss = loss + weight * self.budget.loss(execution)
        if self._cosine_weight > 0:
            loss = loss + self._cosine_weight * _skipped_error(tape)
        skipped = 1 - torch.stack(list(execution.values())).mean().item()
        return loss, {**figures, "sparsity": skipped}

    def state(self) -> dict[str, float]:
        """The threshold, and the price if there is one."""
        return {"threshold": self._threshold} | ({} if self._price is None else {"price": self._price})

    def restore(self, state: Mapping[str, float]) -> None:
        """Take up the threshold and the price of an earlier run."""
        self._threshold, self._price = state.get("threshold", 0.0), state.get("price")

    def fold_threshold(self) -> None:
        """Move the threshold into the routers' biases, where routes of inference have it."""
        for unit in self.model.units if self._held else ():
            router = self.model.part(unit, "router")
            assert isinstance(router, Router)
            router.shift(-self._threshold)
        self._threshold = 0.0

    @torch.no_grad()
    def _follow(self, tape: Mapping[str, Record]) -> None:
        """Move the threshold towards the one with which this step would have skipped the target's share."""
        here = torch.stack([_recorded(record.difference).float().flatten() for record in tape.values()], -1)
        everywhere: torch.Tensor = gather(here).cpu()
        differences = dict(zip(tape, everywhere.unbind(-1), strict=True))
        wanted = common_threshold(differences, self.budget.sparsity, self.budget.weights)
        self._threshold += _FOLLOW * (wanted - self._threshold)

    def _follow_price(self, divergence: torch.Tensor) -> float:
        """Return the mean KL of the last steps over the share that they skipped, in nats."""
        mean: torch.Tensor = reduce(divergence.clone(), "mean")
        found = mean.item() / max(self.budget.sparsity, 1e-3)
        self._price = found if self._price is None else self._price + _FOLLOW * (found - self._price)
        return self._price

    def _language_loss(self, states: torch.Tensor, windows: torch.Tensor) -> tuple[torch.Tensor, float, torch.Tensor]:
        """Return the language-model loss with the recipe's share of distillation, the plain cross-entropy, and the KL.

        The KL has no gradient, and is 0 without distillation.
        """
        share, targets = self.recipe.distill, windows[:, 1:].flatten()
        teacher = self._base_states(windows)[:, :-1].flatten(0, 1) if share > 0 else None
        routed = states[:, :-1].flatten(0, 1)
        loss, plain = language_loss(self.model.logits, self.model.config.vocab_size, routed, targets, teacher, share)
        divergence = (loss.detach() - (1 - share) * plain) / share if share > 0 else torch.zeros_like(plain)
        return loss / targets.numel(), plain.item() / targets.numel(), divergence / targets.numel()

    def _base_states(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the final hidden states of the base, without adapters and their dropout."""
        with torch.no_grad(), adapters_off(self.model), self.model.control.using(mode="execute", tape=None):
            return self.model.states(windows)

    def _routing(self, windows: torch.Tensor, step: int) -> dict[str, Any]:
        """Return how the model routes in a step, as `RoutingControl.using` takes it."""
        if not (self.sampled or self._held or self._random):
            return {"mode": "route"}
        sparsity = self.budget.sparsity
        shape = (windows.shape[0], windows.shape[1])
        noise = step_noise([unit.name for unit in self.model.units], self.seed, step, shape)
        if self._random:  # policy random draws new masks in each step
            masks = {unit: (draw >= sparsity).to(windows.device) for unit, draw in noise.items()}
            return {"mode": "forced", "masks": masks}
        return {
            "mode": "sample",
            "temperature": self.temperature(step),
            "noise": noise,
            "noise_scale": self.recipe.noise,
            "shift": -self._threshold,
        }


def _straight_through(record: Record) -> torch.Tensor:
    """Return the mean hard execution of a unit, with the gradient of the soft gate."""
    hard = record.execute.float().mean()
    if record.soft is None:
        return hard
    soft = record.soft.mean()
    return hard.detach() + soft - soft.detach()


def _skipped_error(tape: dict[str, Record]) -> torch.Tensor:
    """Return the mean of 1 - cosine over all approximated (token, unit) pairs; 0 if there are none."""
    skipped = torch.stack([~record.execute for record in tape.values()])
    error = torch.stack([1 - _recorded(record.cosine) for record in tape.values()])
    count: torch.Tensor = reduce(skipped.sum().float(), "mean")
    return (error * skipped).sum() / count.clamp(min=1)


def _recorded(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor
