"""The key/value policy as data: which keys and values a model stores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KeyPolicy:
    """Which keys and values are stored.

    Attributes:
        name: `full` stores those of every token. `reduced` leaves out tokens that a strongly skipping attention unit
            skips.
        threshold: With `reduced`, the share of the calibration text that an attention unit must skip to be reduced.
    """

    name: str = "full"
    threshold: float = 0.5

    @classmethod
    def chosen(cls, name: str | None, threshold: float | None) -> KeyPolicy | None:
        """Return the policy that the options ask for, or None without options. A threshold alone means `reduced`."""
        if name is None and threshold is None:
            return None
        return cls(name or "reduced", cls.threshold if threshold is None else threshold)
