"""What each stage minimises, as modules that `irc.train` runs and data-parallel training wraps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import nn

from irc.config import RouterRecipe
from irc.modules import Record
from irc.policies import policy_named
from irc.routed import RoutedForCausalLM
from irc.train import Objective, step_noise

Figures = dict[str, float]


class ForecastObjective(Objective):
    """Stage `lff`: L1 + (1 - cosine) between every forecaster and its unit, the base running densely."""

    def __init__(self, model: RoutedForCausalLM, lr: float) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    def trainable(self) -> list[dict[str, Any]]:
        """All forecasters."""
        return [{"params": self.model.adapter_parameters("forecaster"), "lr": self.lr}]

    def forward(self, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, Figures]:
        """Return the loss, summed over units and averaged over tokens, and the mean cosine.

        Args:
            windows: int64 [batch, tokens].
            step: Not used.
        """
        tape: dict[str, Record] = {}
        with self.model.control.using(mode="execute", tape=tape, measure_error=True):
            self.model(input_ids=windows, use_cache=False)
        l1 = torch.stack([_some(record.l1).mean() for record in tape.values()])
        cosine = torch.stack([_some(record.cosine).mean() for record in tape.values()])
        return (l1 + 1 - cosine).sum(), {"cosine": cosine.mean().item()}


class RoutingObjective(Objective):
    """Stages `router` and `lora`: language-model loss, the sparsity target, and the skipped tokens' cosine.

    Args:
        model: Rewritten model.
        recipe: Weights, learning rates and temperatures of the router stage.
        sparsity: Target share of approximated (token, unit) pairs.
        seed: Of the sampling noise.
        steps: Length of the stage, for the temperature.
        extra: Further parameters to train (LoRA), with their learning rate; then routers stay frozen
            and the temperature stays at its end.
    """

    def __init__(
        self,
        model: RoutedForCausalLM,
        recipe: RouterRecipe,
        sparsity: float,
        seed: int,
        steps: int,
        extra: tuple[dict[str, nn.Parameter], float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.sparsity = sparsity
        self.seed = seed
        self.steps = steps
        self.extra = extra
        policy = policy_named(model.spec.policy if model.spec else "informed")
        self._learns, self._ranked = policy.learns, policy.capacity
        self._drawn = policy.forecasts and not policy.learns
        self._cosine_weight = recipe.cosine_weight if policy.forecasts else 0.0

    def trainable(self) -> list[dict[str, Any]]:
        """Routers, and forecasters where they keep learning; or the extra parameters alone."""
        if self.extra is not None:
            return [{"params": self.extra[0], "lr": self.extra[1]}]
        groups = [{"params": self.model.adapter_parameters("router"), "lr": self.recipe.lr}] if self._learns else []
        if self.recipe.forecaster_lr > 0:
            groups.append({"params": self.model.adapter_parameters("forecaster"), "lr": self.recipe.forecaster_lr})
        return groups

    def temperature(self, step: int) -> float:
        """Return the sampling temperature of a step."""
        start, end = self.recipe.temperature_start, self.recipe.temperature_end
        return end if self.extra is not None else start + (end - start) * step / max(1, self.steps - 1)

    def forward(self, windows: torch.Tensor, step: int) -> tuple[torch.Tensor, Figures]:
        """Return the loss and its parts.

        Args:
            windows: int64 [batch, tokens], no padding.
            step: Of the loop; fixes noise and temperature.
        """
        tape: dict[str, Record] = {}
        control = self.model.control
        with control.using(tape=tape, measure_error=self._cosine_weight > 0, **self._routing(windows, step)):
            logits = self.model(input_ids=windows, use_cache=False).logits
        flat = logits[:, :-1].float().flatten(0, 1)
        loss = F.cross_entropy(flat, windows[:, 1:].flatten())
        figures = {"lm": loss.item()}
        if self.recipe.distill > 0:
            loss = (1 - self.recipe.distill) * loss + self.recipe.distill * self._divergence(flat, windows)
        mean_execution = torch.stack([_straight_through(record) for record in tape.values()]).mean()
        if self.extra is None and self._learns and not self._ranked:
            # The gap is taken over all processes; its gradient is each process's own share of it.
            gap = (reduce(mean_execution.detach().clone(), "mean") - (1 - self.sparsity)).item()
            sign = 1.0 if gap > 0 else -1.0
            loss = loss + self.recipe.sparsity_weight * (sign * (mean_execution - mean_execution.detach()) + abs(gap))
        if self._cosine_weight > 0:
            loss = loss + self._cosine_weight * _skipped_error(tape)
        return loss, {**figures, "sparsity": 1 - mean_execution.item()}

    def _divergence(self, flat: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Return the mean divergence of routed logits [tokens, vocabulary] from those of the dense model."""
        with torch.no_grad(), self.model.control.using(mode="execute", tape=None):
            dense = self.model(input_ids=windows, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        return F.kl_div(flat.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True)

    def _routing(self, windows: torch.Tensor, step: int) -> dict[str, Any]:
        if self.extra is not None and not self._drawn:
            return {"mode": "route"}
        shape = (windows.shape[0], windows.shape[1])
        noise = step_noise([unit.name for unit in self.model.units], self.seed, step, shape)
        if self._drawn:  # policy random: new draws for every step
            masks = {unit: (draw >= self.sparsity).to(windows.device) for unit, draw in noise.items()}
            return {"mode": "forced", "masks": masks}
        return {"mode": "sample", "temperature": self.temperature(step), "noise": noise}


def _straight_through(record: Record) -> torch.Tensor:
    """Mean hard execution of a unit whose gradient is that of the soft gate."""
    hard = record.execute.float().mean()
    if record.soft is None:
        return hard
    soft = record.soft.mean()
    return hard.detach() + soft - soft.detach()


def _skipped_error(tape: dict[str, Record]) -> torch.Tensor:
    """Mean of 1 - cosine over all approximated (token, unit) pairs; 0 when there are none."""
    skipped = torch.stack([~record.execute for record in tape.values()])
    error = torch.stack([1 - _some(record.cosine) for record in tape.values()])
    count: torch.Tensor = reduce(skipped.sum().float(), "mean")
    return (error * skipped).sum() / count.clamp(min=1)


def _some(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor
