"""Which keys and values are stored: those of every token (`full`), or not of what strongly skipping units skip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from irc.errors import InputError
from irc.model.modules import StoredKeys
from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import check_key_policy
from passes.base import PassManager
from passes.mask_skipped_keys import MaskSkippedKeys


@dataclass(frozen=True)
class KeyPolicy:
    """A key/value policy.

    Attributes:
        name: `full` or `reduced`.
        threshold: Attention units that skip at least this share of the calibration text are reduced.
    """

    name: str = "full"
    threshold: float = 0.5

    @classmethod
    def chosen(cls, name: str | None, threshold: float | None) -> KeyPolicy | None:
        """Return the policy that options ask for, None where there is none; a threshold alone means `reduced`."""
        if name is None and threshold is None:
            return None
        return cls(name or "reduced", cls.threshold if threshold is None else threshold)

    def reduced(self, model: RoutedForCausalLM, keep: dict[str, float]) -> frozenset[str]:
        """Return the names of the attention units whose skipped tokens store nothing.

        Args:
            model: Rewritten model.
            keep: Share of executed tokens of every unit on the calibration text.
        """
        if self.name == "full":
            return frozenset()
        attention = [unit.name for unit in model.units if unit.kind == "attention"]
        return frozenset(name for name in attention if 1 - keep[name] >= self.threshold)


def calibrated_keep(model: RoutedForCausalLM) -> dict[str, float]:
    """Return the share of executed tokens of every unit on the calibration text, as the bundle's conversion found it.

    Raises:
        InputError: The model is plain, or its bundle does not say.
    """
    if model.spec is None:
        raise InputError("a plain model skips no token, so it has no key/value policy; convert it first")
    units = model.facts.get("config", {}).get("units", [])
    keep = {unit["name"]: unit.get("calibration_keep") for unit in units}
    if None in [keep.get(unit.name) for unit in model.units] or not keep:
        raise InputError(
            f"{model.facts.get('bundle', 'the bundle')}: it does not say what its units skip of the calibration text, "
            "which the key/value policy goes by; convert again"
        )
    return cast("dict[str, float]", keep)


def set_key_policy(model: RoutedForCausalLM, policy: KeyPolicy, keep: dict[str, float]) -> None:
    """Make a model follow a policy; a unit that is reduced for the first time gets its masks.

    Args:
        model: Rewritten model.
        policy: What to follow.
        keep: Share of executed tokens of every unit on the calibration text.
    """
    check_key_policy(policy.name, policy.threshold)
    reduced = policy.reduced(model, keep)
    PassManager([MaskSkippedKeys(reduced, lambda unit: StoredKeys(unit.name, model.control))]).run(model.graph)
    model.control.reduced = reduced
    model.facts["key_policy"] = policy


def kv_saved(model: RoutedForCausalLM, keep: dict[str, float]) -> float:
    """Return the share of the model's keys and values that are not stored.

    Args:
        model: Rewritten model with its policy.
        keep: Share of executed tokens of every unit.
    """
    attention = [unit.name for unit in model.units if unit.kind == "attention"]
    return sum(1 - keep[name] for name in attention if name in model.control.reduced) / max(1, len(attention))


def kv_facts(model: RoutedForCausalLM, keep: dict[str, float]) -> dict[str, Any]:
    """Return the JSON object `kv`: policy, threshold (None when full), number of reduced units, memory saved."""
    policy = key_policy_of(model)
    return {
        "policy": policy.name,
        "threshold": policy.threshold if policy.name == "reduced" else None,
        "reduced_units": len(model.control.reduced),
        "saved": kv_saved(model, keep),
    }


def key_policy_of(model: RoutedForCausalLM) -> KeyPolicy:
    """Return the policy that a model follows."""
    policy: KeyPolicy = model.facts.get("key_policy", KeyPolicy())
    return policy
