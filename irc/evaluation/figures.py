"""Turns an evaluation into the JSON object that `irc convert` and `irc eval` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from irc.bundle.key_policy import kv_figures
from irc.errors import GateMissed
from irc.evaluation.fidelity import Fidelity
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
    if result.routed is None or result.fidelity is None:
        return {"perplexity": {"dense": result.dense}, "flops_ratio": 1.0}
    figures = _routed_figures(model, result, result.routed, result.fidelity)
    return {
        **figures,
        "target": None if target is None else target.to_dict(),
        "sparsity": {"target": value_of(target, "sparsity"), **figures["sparsity"]},
        "kv": kv_figures(model, result.keep),
        "units": {
            unit.name: {"keep_ratio": result.keep[unit.name], "recoverability": result.recoverability[unit.name]}
            for unit in model.units
        },
    }


def text_figures(model: RoutedForCausalLM, result: Evaluation) -> dict[str, Any]:
    """Return what is reported of one of several texts as JSON data."""
    if result.routed is None or result.fidelity is None:
        return {"tokens": result.tokens, "perplexity": {"dense": result.dense}}
    return {"tokens": result.tokens, **_routed_figures(model, result, result.routed, result.fidelity)}


def _routed_figures(model: RoutedForCausalLM, result: Evaluation, routed: float, fidelity: Fidelity) -> dict[str, Any]:
    """Return what is reported of the main text and of every further text."""
    return {
        "fidelity": asdict(fidelity),
        "perplexity": {"dense": result.dense, "routed": routed, "ratio": routed / result.dense},
        "sparsity": {
            "realized": result.sparsity(model),
            "attention": result.sparsity(model, "attention"),
            "ffn": result.sparsity(model, "ffn"),
        },
        "flops_ratio": result.flops_ratio,
    }


def worst_text(texts: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the name of the text on which the routed model is furthest from the dense one, None without any."""
    measured = [text for text in texts if "fidelity" in text]
    return max(measured, key=lambda text: text["fidelity"]["kl"])["name"] if measured else None


def check_limits(metrics: Mapping[str, Any], limits: Mapping[str, float]) -> None:
    """Hold the figures of every text, the main one included, against limits.

    Args:
        metrics: Of a conversion or an evaluation.
        limits: The largest `kl` and the least `top1` that are allowed; any of them may be missing.

    Raises:
        GateMissed: Names the text that is furthest from the limit, and its figure.
    """
    texts = [{**metrics, "name": metrics["data"]["name"]}, *metrics.get("texts", [])]
    measured = {text["name"]: text["fidelity"] for text in texts if "fidelity" in text}
    missed = []
    if measured and "kl" in limits:
        name = max(measured, key=lambda name: measured[name]["kl"])
        if measured[name]["kl"] > limits["kl"]:
            missed.append(f"KL is {measured[name]['kl']:.3f} on {name}, at most {limits['kl']:g} is allowed")
    if measured and "top1" in limits:
        name = min(measured, key=lambda name: measured[name]["top1"])
        if measured[name]["top1"] < limits["top1"]:
            missed.append(
                f"the likeliest token is the same for {measured[name]['top1']:.3f} of {name}, at least "
                f"{limits['top1']:g} is required"
            )
    if missed:
        raise GateMissed("; ".join(missed))
