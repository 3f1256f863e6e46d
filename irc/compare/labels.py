"""How a comparison's groups and figures are written, in the terminal and in the report."""

from __future__ import annotations

from typing import Any


def name_of(group: dict[str, Any]) -> str:
    """Return how a group is called: policy, LoRA, option."""
    parts = [group["policy"], "+ LoRA" if group["lora"] else "", group["variant"]]
    return " ".join(part for part in parts if part)


def with_spread(figure: dict[str, float], digits: int = 3) -> str:
    """Return a mean, and its standard deviation where there is one."""
    deviation = f" ± {figure['std']:.{digits}f}" if figure["min"] != figure["max"] else ""
    return f"{figure['mean']:.{digits}f}{deviation}"
