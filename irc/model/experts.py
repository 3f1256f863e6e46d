"""Mixtures of experts as plain linears, which replace transformers' fused experts before capture.

Checkpoints hold each expert's matrices separately, and transformers joins them when it loads a model. Here they stay
separate, so that weights are assigned without a copy. In PyTorch every expert computes every token;
`passes.route_experts` makes the exported model compute an expert only for the tokens that chose it.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from irc.errors import InputError

_MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class Expert(nn.Module):
    """A gated FFN: d -> hidden -> d."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, tokens, d] for x [batch, tokens, d]."""
        result: torch.Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return result


class Experts(nn.Module):
    """The sum of the experts that the gate ranks first for each token, weighted by its softmax.

    Args:
        width: Hidden size d.
        hidden: Hidden size of each expert.
        count: Number of experts.
        per_token: Experts that each token uses.
        normalised: Whether the weights of a token's experts sum to one.
        activation: Name of the experts' activation.
    """

    def __init__(self, width: int, hidden: int, count: int, per_token: int, normalised: bool, activation: str) -> None:
        super().__init__()
        self.per_token, self.normalised = per_token, normalised
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(Expert(width, hidden, activation) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, tokens, d] for x [batch, tokens, d]."""
        best, index = torch.topk(torch.softmax(self.gate(x), dim=-1, dtype=torch.float32), self.per_token, dim=-1)
        if self.normalised:
            best = best / best.sum(-1, keepdim=True)
        best = best.to(x.dtype)
        terms = [expert(x) * (best * (index == i)).sum(-1, keepdim=True) for i, expert in enumerate(self.experts)]
        result: torch.Tensor = terms[0]
        for term in terms[1:]:
            result = result + term
        return result


def separate_experts(twin: PreTrainedModel, config: PretrainedConfig) -> None:
    """Replace every mixture of experts of a model on the meta device by `Experts`.

    Raises:
        InputError: The mixture is of an unknown kind.
    """
    for name, module in list(twin.named_modules()):
        if not hasattr(module, "experts"):
            continue
        options = _options(config)
        if options is None or hasattr(module, "shared_expert"):
            raise InputError(
                f"{config.model_type}: this kind of mixture of experts is not supported; "
                "convert a Mixtral, Qwen3-MoE or OLMoE model, or a dense one"
            )
        dtype = next(module.parameters()).dtype
        parent, _, leaf = name.rpartition(".")
        with torch.device("meta"):
            setattr(twin.get_submodule(parent), leaf, Experts(**options).to(dtype).train(False))
        # Building the twin wrote its choice into the configuration, which a model without fused experts refuses.
        config._experts_implementation = "eager"


def _options(config: Any) -> dict[str, Any] | None:
    common = {"width": config.hidden_size, "per_token": getattr(config, "num_experts_per_tok", 0)}
    if config.model_type == "mixtral":
        own = {"hidden": config.intermediate_size, "count": config.num_local_experts, "normalised": True}
    elif config.model_type == "qwen3_moe":
        own = {"hidden": config.moe_intermediate_size, "count": config.num_experts}
        own["normalised"] = config.norm_topk_prob
    elif config.model_type == "olmoe":
        own = {"hidden": config.intermediate_size, "count": config.num_experts, "normalised": config.norm_topk_prob}
    else:
        return None
    return {**common, **own, "activation": config.hidden_act}


def stored_name(name: str, config: PretrainedConfig) -> str:
    """Return the name of a weight in checkpoints; only Mixtral's differ."""
    if config.model_type != "mixtral" or ".mlp." not in name:
        return name
    name = name.replace(".mlp.", ".block_sparse_moe.")
    return re.sub("gate_proj|down_proj|up_proj", lambda found: _MIXTRAL_NAMES[found[0]], name)


def share_of_experts(config: PretrainedConfig) -> float:
    """Return the share of the experts that each token uses; 1 for a dense model."""
    options = _options(config)
    return options["per_token"] / options["count"] if options else 1.0
