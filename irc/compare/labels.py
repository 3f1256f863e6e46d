"""Formats the groups and figures of a comparison, for the terminal and the report."""

from __future__ import annotations

from typing import Any

from irc.recipe.target import TargetKind


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


def note_of(found: dict[str, Any]) -> str:
    """Return what a reader must know about a gap: which policies skip another share than the target says."""
    return f"unfair: {' and '.join(found['missed'])} missed the target" if found["missed"] else ""


def flops_of(group: dict[str, Any]) -> str:
    """Return the FLOPs ratio of a group, marked if that is its target and a seed missed it."""
    return f"{group['flops_ratio']:.3f}{' (missed)' if missed_in(group, 'flops') else ''}"


def realized_of(group: dict[str, Any]) -> str:
    """Return the realized sparsity of a group, marked if that is its target and a seed missed it."""
    return f"{group['realized']['mean']:.3f}{' (missed)' if missed_in(group, 'sparsity') else ''}"


def missed_in(group: dict[str, Any], kind: TargetKind) -> bool:
    """Return whether the target of a group is of this kind, and a seed missed it."""
    return bool(group["missed"]) and kind == ("sparsity" if group.get("flops") is None else "flops")
