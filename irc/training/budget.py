"""What meets the sparsity target: the model as a whole, its FLOPs, or every unit by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import reduce

from irc.errors import IrcError
from irc.model.flops import unit_flops
from irc.model.modules import Record
from irc.model.routed import RoutedForCausalLM

_MOST = 0.95  # of a unit's tokens that a budget of its own lets it skip
_BATCH = 16


@dataclass(frozen=True)
class Budget:
    """How much is skipped, and where.

    Attributes:
        sparsity: Target share to approximate.
        weights: What each unit counts in that share, summing to 1.
        targets: Share of its tokens that each unit skips; None where the model meets the target as a whole.
    """

    sparsity: float
    weights: dict[str, float]
    targets: dict[str, float] | None = None

    def loss(self, execution: Mapping[str, torch.Tensor], sparsity: float) -> torch.Tensor:
        """Return the mean distance between what executes and what should.

        The distance is taken over all processes; its gradient is each process's own share of it.

        Args:
            execution: Mean execution of every unit, scalars that carry the routers' gradient.
            sparsity: Target share of this step.
        """
        if self.targets is None:
            met = sum((self.weights[unit] * mean for unit, mean in execution.items()), torch.zeros(())).reshape(1)
            wanted = met.new_tensor([1 - sparsity])
        else:
            met = torch.stack(list(execution.values()))
            wanted = met.new_tensor([1 - self.targets[unit] for unit in execution])
        gap = reduce(met.detach().clone(), "mean") - wanted
        distance: torch.Tensor = (gap.sign() * (met - met.detach()) + gap.abs()).mean()
        return distance

    def realized(self, skipped: Mapping[str, float]) -> float:
        """Return the share that the target counts, from the share of its tokens that each unit skips."""
        return sum(self.weights[unit] * share for unit, share in skipped.items())

    def missed(self, skipped: Mapping[str, float]) -> float:
        """Return how far the shares that units skip are from what they should."""
        if self.targets is None:
            return abs(self.realized(skipped) - self.sparsity)
        return sum(abs(share - self.targets[unit]) for unit, share in skipped.items()) / len(skipped)


def plain_budget(units: list[str], sparsity: float) -> Budget:
    """Return the budget in which all (token, unit) pairs count alike."""
    return Budget(sparsity, dict.fromkeys(units, 1 / len(units)))


def make_budget(model: RoutedForCausalLM, kind: str, sparsity: float, text: torch.Tensor) -> Budget:
    """Return a model's budget.

    Args:
        model: Rewritten model with fitted forecasters.
        kind: `model`, `flops`, `unit` or `recoverability`.
        sparsity: Target share.
        text: Calibration windows, int64 [windows, length].
    """
    plain = plain_budget([unit.name for unit in model.units], sparsity)
    if kind == "model":
        return plain
    if kind == "unit":
        return Budget(sparsity, plain.weights, dict.fromkeys(plain.weights, sparsity))
    if kind == "flops":
        saved = {n: f.gated + f.scores - f.forecaster for n, f in unit_flops(model, text.shape[1]).items()}
        return Budget(sparsity, {name: value / sum(saved.values()) for name, value in saved.items()})
    if kind == "recoverability":
        merits = {name: 1 / max(1 - cosine, 1e-3) for name, cosine in _recoverability(model, text).items()}
        return Budget(sparsity, plain.weights, shared_out(merits, sparsity))
    raise IrcError(f"router.budget is '{kind}'; this is a fault of irc")


def shared_out(merits: Mapping[str, float], mean: float) -> dict[str, float]:
    """Share a mean out over units in proportion to their merits, none getting more than 0.95.

    Args:
        merits: Of every unit, above 0.
        mean: Of the shares that are returned.
    """
    most = max(_MOST, mean)
    shares: dict[str, float] = {}
    while len(shares) < len(merits):
        rest = {name: merit for name, merit in merits.items() if name not in shares}
        left = mean * len(merits) - sum(shares.values())
        scale = left / sum(rest.values())
        full = [name for name, merit in rest.items() if merit * scale > most]
        shares |= dict.fromkeys(full, most) if full else {name: merit * scale for name, merit in rest.items()}
    return {name: shares[name] for name in merits}


@torch.no_grad()
def _recoverability(model: RoutedForCausalLM, text: torch.Tensor) -> dict[str, float]:
    """Return the mean cosine between every unit and its forecast, the model running densely."""
    total = dict.fromkeys((unit.name for unit in model.units), 0.0)
    for batch in text.split(_BATCH):
        tape: dict[str, Record] = {}
        with model.control.using(mode="execute", tape=tape, measure_error=True):
            model.states(batch.to(model.device))
        for name, record in tape.items():
            assert record.cosine is not None
            total[name] += record.cosine.sum().item()
    return {name: value / text.numel() for name, value in total.items()}
