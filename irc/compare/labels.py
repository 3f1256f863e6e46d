"""Formats the groups and figures of a comparison, for the terminal and the report."""

from __future__ import annotations

from typing import Any


def name_of(group: dict[str, Any]) -> str:
    """Return the name of a group: policy, LoRA, variant."""
    parts = [group["policy"], "+ LoRA" if group["lora"] else "", group["variant"]]
    return " ".join(part for part in parts if part)


def target_label(row: dict[str, Any]) -> str:
    """Return the target of a group or a cell: a sparsity, or `FLOPs` and a ratio."""
    flops = row.get("flops")
    return f"{row['sparsity']:g}" if flops is None else f"FLOPs {flops:g}"


def with_spread(figure: dict[str, float], digits: int = 3) -> str:
    """Return a mean, with its standard deviation if the values differ."""
    deviation = f" ± {figure['std']:.{digits}f}" if figure["min"] != figure["max"] else ""
    return f"{figure['mean']:.{digits}f}{deviation}"
