"""The trade-off of the key/value policy `reduced`: memory saved against perplexity, over thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from irc.bundle.key_policy import KeyPolicy, calibrated_keep, key_policy_of, kv_saved, set_key_policy
from irc.evaluation.perplexity import evaluate_routed
from irc.model.routed import RoutedForCausalLM
from irc.progress import ProgressFactory


def kv_sweep(
    model: RoutedForCausalLM, text: torch.Tensor, thresholds: Sequence[float], progress: ProgressFactory
) -> list[dict[str, Any]]:
    """Evaluate a model under `reduced` at several thresholds; its own policy is restored.

    Thresholds that reduce the same units share one evaluation.

    Args:
        model: Rewritten model of a bundle.
        text: int64 [windows, length].
        thresholds: Each 0 to 1.
        progress: Makes progress bars.

    Returns:
        For each threshold `threshold`, `reduced_units`, `saved` (share of keys and values not stored), `perplexity`
        and `sparsity` of all units on this text.
    """
    keep, before = calibrated_keep(model), key_policy_of(model)
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
