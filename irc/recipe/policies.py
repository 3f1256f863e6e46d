"""The routing policies, as data: how each decides, what replaces a skipped unit, and how it is trained.

All policies go through the same passes and the same training loop, so that comparisons are fair. `informed` is the
project's subject (arXiv 2510.13831); the others are its baselines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from irc.errors import InputError

PolicyName = Literal["informed", "skipgpt", "mod", "random", "static", "static-forecast"]
"""The names of the policies; `POLICIES` describes each."""

Reads = Literal["unit", "stream", "layer"]
"""Input of a router: the unit's normed input, the residual stream before the unit, or the layer's input."""


@dataclass(frozen=True)
class Policy:
    """A routing policy.

    Attributes:
        name: The name that `--policy` takes.
        summary: One line for people.
        forecasts: Whether a forecaster replaces a skipped unit; otherwise a skipped unit adds nothing.
        reads: Input of its routers.
        learns: Whether its routers are trained.
        causal: Whether a token's route depends only on this token and earlier ones; only then can the model generate
            text and be exported.
        capacity: Whether a fixed share of each sequence executes, by rank.
        whole_units: Whether units are skipped for every token or for none.
        teach_steps: Default number of batches that teach its routers the cost of skipping, for targets up to 0.5.
    """

    name: PolicyName
    summary: str
    forecasts: bool
    reads: Reads
    learns: bool = True
    causal: bool = True
    capacity: bool = False
    whole_units: bool = False
    teach_steps: int = 0


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            "informed",
            "a router of the unit's input chooses between executing and forecasting",
            True,
            "unit",
            teach_steps=16,
        ),
        Policy(
            "skipgpt",
            "a router of the layer's input chooses between executing and skipping (arXiv 2506.04179)",
            False,
            "layer",
        ),
        Policy(
            "mod",
            "the highest-ranked tokens of each sequence execute (Mixture-of-Depths, arXiv 2404.02258)",
            False,
            "layer",
            causal=False,
            capacity=True,
        ),
        Policy("random", "chance chooses between executing and forecasting", True, "unit", learns=False, causal=False),
        Policy(
            "static",
            "whole units are dropped, least important first (ShortGPT, arXiv 2403.03853)",
            False,
            "stream",
            learns=False,
            whole_units=True,
        ),
        Policy(
            "static-forecast",
            "forecasts replace whole units, those first that raise the loss least",
            True,
            "unit",
            learns=False,
            whole_units=True,
        ),
    )
}


def policy_named(name: str) -> Policy:
    """Return a policy.

    Raises:
        InputError: There is no policy of that name.
    """
    if name not in POLICIES:
        raise InputError(f"policy is '{name}'; choose from {', '.join(POLICIES)}")
    return POLICIES[name]


def refuse_whole_sequences(policy: Policy, wish: str) -> None:
    """Refuse a policy that routes whole sequences where tokens arrive one by one.

    Args:
        policy: The model's policy.
        wish: What it was asked to do, such as `generate text`.

    Raises:
        InputError: The policy is not causal.
    """
    if not policy.causal:
        raise InputError(
            f"policy {policy.name} cannot {wish}: {policy.summary}, so a token's route depends on the whole text; use "
            "it with irc eval and irc compare"
        )
