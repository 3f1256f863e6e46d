"""The routing policies, as data: what each skips by, what takes a skipped unit's place, and how it is trained.

All go through the same passes and the same loop, so that they compare fairly. `informed` is what the project is
about (arXiv 2510.13831); the others are what it is measured against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from irc.errors import InputError
from irc.model.modules import Forecaster, Router, ZeroForecaster, router_hidden
from passes.insert_routers import Reads


@dataclass(frozen=True)
class Policy:
    """What a policy is.

    Attributes:
        name: As `--policy` takes it.
        summary: One line for people.
        forecasts: Whether a forecaster stands in for a skipped unit; otherwise it adds nothing.
        reads: What its routers read.
        learns: Whether its routers are trained.
        causal: Whether a token's route depends on that token and earlier ones alone; only then can the model
            generate text and be exported.
        capacity: Whether a fixed share of each sequence executes, by rank.
        teach_steps: Steps in which its routers first learn what skipping costs, for targets up to 0.5 and unless the
            recipe says otherwise.
    """

    name: str
    summary: str
    forecasts: bool
    reads: Reads
    learns: bool = True
    causal: bool = True
    capacity: bool = False
    teach_steps: int = 0

    @property
    def stages(self) -> list[str]:
        """The stages that the policy needs."""
        return ["lff", "router"] if self.forecasts else ["router"]


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("informed", "execute or forecast, by a router of the unit's input", True, "unit", teach_steps=30),
        Policy("skipgpt", "execute or skip, by a router of the layer's input (arXiv 2506.04179)", False, "layer"),
        Policy(
            "mod",
            "the best-ranked tokens of each sequence execute (Mixture-of-Depths, arXiv 2404.02258)",
            False,
            "layer",
            causal=False,
            capacity=True,
        ),
        Policy("random", "execute or forecast, by chance", True, "unit", learns=False, causal=False),
        Policy(
            "static", "whole units dropped, least important first (ShortGPT, arXiv 2403.03853)", False, "stream", False
        ),
    )
}


def policy_named(name: str) -> Policy:
    """Return a policy.

    Raises:
        InputError: There is none of that name.
    """
    if name not in POLICIES:
        raise InputError(f"policy is '{name}'; choose from {', '.join(POLICIES)}")
    return POLICIES[name]


def refuse_whole_sequences(policy: Policy, wish: str) -> None:
    """Refuse a policy that routes whole sequences, for what meets tokens one by one.

    Raises:
        InputError: Says why.
    """
    if not policy.causal:
        raise InputError(
            f"policy {policy.name} cannot {wish}: {policy.summary}, so that a token's route is known only with the "
            "whole text; it serves irc eval and irc compare"
        )


class RandomRouter(nn.Module):
    """Logits whose difference is at least 0 for a random share 1 - sparsity of the tokens.

    The draws depend on seed and shape alone: the same call gives the same routes.
    """

    def __init__(self, sparsity: float, seed: int) -> None:
        super().__init__()
        self.sparsity = sparsity
        self.seed = seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, tokens, 2] for x [batch, tokens, d], of which only the shape is read."""
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.rand(x.shape[:-1], generator=generator).to(x.device)
        return torch.stack([draws, torch.full_like(draws, self.sparsity)], -1)


class StaticRouter(nn.Module):
    """The same logits for every token: a unit that always executes, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([1.0, 0.0]))

    def choose(self, execute: bool) -> None:
        """Let the unit execute always, or never."""
        with torch.no_grad():
            self.logits.copy_(torch.tensor([1.0, 0.0] if execute else [0.0, 1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, tokens, 2] for x [batch, tokens, d], of which only the shape is read."""
        # Of x, so that an exported graph does not merge the decisions of units that agree.
        return 0 * x[..., :2] + self.logits


def make_forecaster(policy: Policy, width: int, rank: int, activation: str) -> nn.Module:
    """Return what stands in for a skipped unit of hidden size `width`."""
    return Forecaster(width, rank, activation) if policy.forecasts else ZeroForecaster()


def make_router(policy: Policy, width: int, rank: int, sparsity: float, seed: int) -> nn.Module:
    """Return the router of one unit.

    Without forecasters a router has hidden size d // 4 (SkipGPT), with them d // 4 - 2 * rank, so that both policies
    hold as many parameters.

    Args:
        policy: Whose router.
        width: Hidden size d of the unit.
        rank: Of the forecaster.
        sparsity: Target share of skipped tokens; only `random` reads it.
        seed: Of this unit's draws; only `random` reads it.
    """
    if policy.learns:
        return Router(width, router_hidden(width, rank) if policy.forecasts else max(8, width // 4))
    return RandomRouter(sparsity, seed) if policy.forecasts else StaticRouter()
