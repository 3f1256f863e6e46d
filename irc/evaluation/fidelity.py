"""How close a routed model stays to its dense model: divergence of the predictions, and equal likeliest tokens.

Perplexity cannot tell: a model that adapts to the text's kind while it is trained may have a lower one than the dense
model, although it predicts other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_BLOCK = 64
_RESAMPLES = 200
_SEED = 0


@dataclass(frozen=True)
class Fidelity:
    """Figures over the predicted tokens of one text.

    Attributes:
        kl: Mean of KL(dense || routed) over tokens, in nats.
        kl_p99: Its 99th percentile over tokens.
        kl_p99_interval: Bounds of a 95 % bootstrap interval of the percentile. Blocks of 64 tokens are drawn, because
            tokens beside each other are alike.
        top1: Share of tokens with the same likeliest successor.
    """

    kl: float
    kl_p99: float
    kl_p99_interval: tuple[float, float]
    top1: float


def fidelity_of(divergence: torch.Tensor, same: torch.Tensor) -> Fidelity:
    """Summarize a text.

    Args:
        divergence: KL(dense || routed) of every predicted token, in nats, float [tokens], in the order of the text.
        same: bool [tokens], whether both models find the same token likeliest.
    """
    generator = torch.Generator().manual_seed(_SEED)
    values = divergence.double().cpu()
    blocks = values.split(_BLOCK)
    drawn = torch.randint(len(blocks), (_RESAMPLES, len(blocks)), generator=generator).tolist()
    percentiles = torch.stack([_p99(torch.cat([blocks[row] for row in rows])) for rows in drawn])
    low, high = torch.quantile(percentiles, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Fidelity(
        kl=values.mean().item(),
        kl_p99=_p99(values).item(),
        kl_p99_interval=(low, high),
        top1=same.double().mean().item(),
    )


def _p99(values: torch.Tensor) -> torch.Tensor:
    """Return the smallest value that at least 99 % of the values do not exceed."""
    return values.kthvalue(max(1, -(-99 * len(values) // 100))).values
