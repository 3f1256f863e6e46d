"""Makes a model follow a key/value policy, and says what that saves."""

from __future__ import annotations

from typing import Any

from irc.bundle.contents import bundle_of
from irc.errors import InputError
from irc.model.modules import StoredKeys
from irc.model.routed import RoutedForCausalLM
from irc.recipe.key_policy import KeyPolicy
from irc.recipe.recipe import check_key_policy
from passes.base import PassManager
from passes.mask_skipped_keys import MaskSkippedKeys


def reduced_units(model: RoutedForCausalLM, policy: KeyPolicy, keep: dict[str, float]) -> frozenset[str]:
    """Return the names of the attention units whose skipped tokens store nothing.

    Args:
        model: Rewritten model.
        policy: Key/value policy.
        keep: Share of executed tokens of every unit on the calibration text.
    """
    if policy.name == "full":
        return frozenset()
    attention = [unit.name for unit in model.units if unit.kind == "attention"]
    return frozenset(name for name in attention if 1 - keep[name] >= policy.threshold)


def calibrated_keep(model: RoutedForCausalLM) -> dict[str, float]:
    """Return the share of the calibration text that every unit executes, as the bundle's conversion measured it.

    Raises:
        InputError: The model is plain, or its bundle does not hold these shares.
    """
    if model.spec is None:
        raise InputError("a plain model skips no token, so it has no key/value policy; convert it first")
    bundle = bundle_of(model)
    measured = {} if bundle is None else bundle.config.measured.units
    keep = {name: unit.calibration_keep for name, unit in measured.items() if unit.calibration_keep is not None}
    if not keep or any(unit.name not in keep for unit in model.units):
        raise InputError(
            f"{'the bundle' if bundle is None else bundle.folder}: it does not say what its units skip of the "
            "calibration text, which the key/value policy depends on; convert again"
        )
    return keep


def set_key_policy(model: RoutedForCausalLM, policy: KeyPolicy, keep: dict[str, float]) -> None:
    """Make a model follow a policy. A unit that is reduced for the first time gets its masks.

    Args:
        model: Rewritten model.
        policy: Policy to follow.
        keep: Share of executed tokens of every unit on the calibration text.

    Raises:
        InputError: The policy's name or threshold is not valid.
    """
    check_key_policy(policy.name, policy.threshold)
    reduced = reduced_units(model, policy, keep)
    PassManager([MaskSkippedKeys(reduced, lambda unit: StoredKeys(unit.name, model.control))]).run(model.graph)
    model.rewritten()
    model.control.reduced = reduced
    model.key_policy = policy


def kv_saved(model: RoutedForCausalLM, keep: dict[str, float]) -> float:
    """Return the share of the model's keys and values that are not stored.

    Args:
        model: Rewritten model with its policy.
        keep: Share of executed tokens of every unit.
    """
    attention = [unit.name for unit in model.units if unit.kind == "attention"]
    return sum(1 - keep[name] for name in attention if name in model.control.reduced) / max(1, len(attention))


def kv_figures(model: RoutedForCausalLM, keep: dict[str, float]) -> dict[str, Any]:
    """Return the JSON object `kv`: policy, threshold (None with full), number of reduced units, share saved.

    Args:
        model: Rewritten model with its policy.
        keep: Share of executed tokens of every unit.
    """
    policy = model.key_policy
    return {
        "policy": policy.name,
        "threshold": policy.threshold if policy.name == "reduced" else None,
        "reduced_units": len(model.control.reduced),
        "saved": kv_saved(model, keep),
    }


__all__ = ["KeyPolicy", "calibrated_keep", "kv_figures", "kv_saved", "reduced_units", "set_key_policy"]
