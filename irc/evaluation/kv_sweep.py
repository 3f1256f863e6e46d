"""Measures the trade-off between memory saved and perplexity under the key/value policy `reduced`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from irc.bundle.key_policy import calibrated_keep, kv_saved, set_key_policy
from irc.evaluation.perplexity import evaluate_routed
from irc.model.routed import RoutedForCausalLM
from irc.progress import ProgressFactory
from irc.recipe.key_policy import KeyPolicy


def kv_sweep(
    model: RoutedForCausalLM, text: torch.Tensor, thresholds: Sequence[float], progress: ProgressFactory
) -> list[dict[str, Any]]:
    """Evaluate a model under policy `reduced` at several thresholds, then restore its own policy.

    Thresholds that reduce the same units share one evaluation.

    Args:
        model: Rewritten model of a bundle.
        text: int64 [windows, length].
        thresholds: Thresholds, each between 0 and 1.
        progress: Makes progress bars.

    Returns:
        For each threshold: `threshold`, `reduced_units`, `saved` (the share of keys and values that is not stored),
        `perplexity` and `sparsity` on this text.
    """
    keep, before = calibrated_keep(model), model.key_policy
    policies = [KeyPolicy("reduced", threshold) for threshold in thresholds]
    measured: dict[frozenset[str], dict[str, Any]] = {}
    rows = []
    try:
        for policy in policies:
            set_key_policy(model, policy, keep)
            reduced = model.control.reduced
            if reduced not in measured:
                with progress(f"threshold {policy.threshold:g}", len(text)) as bar:
                    perplexity, executed = evaluate_routed(model, text, bar)
                measured[reduced] = {
                    "reduced_units": len(reduced),
                    "saved": kv_saved(model, executed),
                    "perplexity": perplexity,
                    "sparsity": 1 - sum(executed.values()) / len(executed),
                }
            rows.append({"threshold": policy.threshold, **measured[reduced]})
    finally:
        set_key_policy(model, before, keep)
    return rows
