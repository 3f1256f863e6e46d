"""Turns an evaluation into the JSON object that `irc convert` and `irc eval` share."""

from __future__ import annotations

from typing import Any

from irc.bundle.key_policy import kv_figures
from irc.evaluation.perplexity import Evaluation
from irc.model.routed import RoutedForCausalLM
from irc.recipe.target import Target, value_of


def result_metrics(model: RoutedForCausalLM, result: Evaluation, target: Target | None) -> dict[str, Any]:
    """Return an evaluation as JSON data.

    Args:
        model: The evaluated model.
        result: Its evaluation.
        target: What the conversion was to reach, or None.
    """
    if result.routed is None:
        return {"perplexity": {"dense": result.dense}, "flops_ratio": 1.0}
    return {
        "perplexity": {"dense": result.dense, "routed": result.routed, "ratio": result.routed / result.dense},
        "target": None if target is None else target.to_dict(),
        "sparsity": {
            "target": value_of(target, "sparsity"),
            "realized": result.sparsity(model),
            "attention": result.sparsity(model, "attention"),
            "ffn": result.sparsity(model, "ffn"),
        },
        "flops_ratio": result.flops_ratio,
        "kv": kv_figures(model, result.keep),
        "units": {
            unit.name: {"keep_ratio": result.keep[unit.name], "recoverability": result.recoverability[unit.name]}
            for unit in model.units
        },
    }
