"""The routing policies, as data: what each skips by, what takes a skipped unit's place, and how it is trained.

All go through the same passes and the same loop, so that they compare fairly. `informed` is what the project is
about (arXiv 2510.13831); the others are what it is measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from irc.errors import InputError

Reads = Literal["unit", "stream", "layer"]
"""What a router reads: the unit's normed input, the residual stream before the unit, or the layer's input."""


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
