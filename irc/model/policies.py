"""Makes the routers and forecasters that `irc.recipe.policies` describes."""

from __future__ import annotations

import torch
from torch import nn

from irc.model.modules import Forecaster, Router, ZeroForecaster, router_hidden
from irc.recipe.policies import Policy


class RandomRouter(nn.Module):
    """Routes at random: the difference of the logits is at least 0 for a share 1 - sparsity of the tokens.

    The draws depend on seed and shape alone, so the same call gives the same routes.
    """

    def __init__(self, sparsity: float, seed: int) -> None:
        super().__init__()
        self.sparsity = sparsity
        self.seed = seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, tokens, 2] for x [batch, tokens, d], of which only the shape matters."""
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.rand(x.shape[:-1], generator=generator).to(x.device)
        return torch.stack([draws, torch.full_like(draws, self.sparsity)], -1)


class StaticRouter(nn.Module):
    """Gives every token the same logits: the unit always executes, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([1.0, 0.0]))

    def choose(self, execute: bool) -> None:
        """Make the unit always execute, or never."""
        with torch.no_grad():
            self.logits.copy_(torch.tensor([1.0, 0.0] if execute else [0.0, 1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, tokens, 2] for x [batch, tokens, d], of which only the shape matters."""
        # Depends on x, so that an exported graph does not merge the decisions of units that agree.
        return 0 * x[..., :2] + self.logits


def make_forecaster(policy: Policy, width: int, rank: int, activation: str) -> nn.Module:
    """Return what replaces a skipped unit of hidden size `width`."""
    return Forecaster(width, rank, activation) if policy.forecasts else ZeroForecaster()


def make_router(policy: Policy, width: int, rank: int, hidden: int, sparsity: float, seed: int) -> nn.Module:
    """Return the router of one unit.

    Args:
        policy: Policy that the router belongs to.
        width: Hidden size d of the unit.
        rank: Rank of the forecasters of attention units.
        hidden: Hidden units. 0 for d // 4 without forecasters (SkipGPT) and d // 4 - 2 * rank with forecasters, so that
            both kinds of policy have the same number of parameters in attention units.
        sparsity: Target share of skipped tokens; only `random` reads it.
        seed: Seed of this unit's draws; only `random` reads it.
    """
    if policy.whole_units:
        return StaticRouter()
    if policy.learns:
        usual = router_hidden(width, rank) if policy.forecasts else max(8, width // 4)
        return Router(width, hidden or usual)
    return RandomRouter(sparsity, seed)
