"""What a conversion is to reach: a share of skipped pairs, or a ratio of FLOPs."""

from __future__ import annotations

from typing import Literal, NamedTuple

from irc.errors import InputError

TargetKind = Literal["sparsity", "flops"]
TARGET_KINDS: tuple[TargetKind, ...] = ("sparsity", "flops")
NAMES: dict[TargetKind, str] = {"sparsity": "sparsity", "flops": "FLOPs"}
"""How texts call the kinds."""


class Target(NamedTuple):
    """What must be reached.

    Attributes:
        kind: `sparsity` (share of approximated (token, unit) pairs) or `flops` (matrix-multiply FLOPs, routed over
            dense).
        value: From 0 to 1.
    """

    kind: TargetKind
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"

    def to_dict(self) -> dict[str, float]:
        """Return the target as JSON data, such as `{"flops": 0.8}`."""
        return {self.kind: self.value}


def value_of(target: Target | None, kind: TargetKind) -> float | None:
    """Return a target's value if it is of this kind, otherwise None."""
    return target.value if target is not None and target.kind == kind else None


def target_of(sparsity: float | None, flops: float | None) -> Target | None:
    """Return the target that one of two values gives; None if neither does.

    Raises:
        InputError: Both do.
    """
    if sparsity is not None and flops is not None:
        raise InputError(
            f"sparsity is {sparsity} and flops is {flops}, but only one can be the target; leave one out",
            options=("sparsity", "flops"),
        )
    if flops is not None:
        return Target("flops", flops)
    return None if sparsity is None else Target("sparsity", sparsity)
