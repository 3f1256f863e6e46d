"""Turns cells into figures: means over seeds, the gap that informed routing closes, the time it takes to catch up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from irc.compare.cells import DENSE
from irc.recipe.stages import STAGE_NAMES
from irc.recipe.target import TARGET_KINDS, Target, TargetKind, target_of, value_of

Row = dict[str, Any]
TOLERANCE: dict[TargetKind, float] = {"sparsity": 0.02, "flops": 0.01}
"""A cell whose figure is further from its target has missed it, and compares with others unfairly."""

_BUDGET = frozenset({"lff.tokens", "lff.steps", "router.steps", "router.calibration_tokens"})


def training_seconds(row: Row, kind: str = "seconds") -> float:
    """Return how long a cell's stages took: `seconds` of wall-clock time, or `cpu_seconds` summed over processors."""
    stages: dict[str, dict[str, float]] = row["figures"]["stages"]
    return sum(stages[stage][kind] for stage in STAGE_NAMES if stage in stages)


def summarize(rows: Sequence[Row], targets: Sequence[Target]) -> dict[str, Any]:
    """Return the figures of a comparison.

    Args:
        rows: One per cell.
        targets: Of the plan.

    Returns:
        `groups`: means and spreads over seeds for each policy, target, LoRA and variant; `missed` counts the seeds
        that missed the target.
        `gaps`: how much of each other policy's distance from the dense model informed closes, for each target, without
        and with LoRA (see `gap_closed`); `missed` names the policies of which a seed missed the target.
        `catch_up`: the shortest informed training whose result is no worse than skipgpt's full training.
    """
    others = [name for name in dict.fromkeys(row["policy"] for row in rows) if name not in ("informed", DENSE)]
    cases = itertools.product((False, True), others, targets)
    return {
        "groups": groups(rows),
        "gaps": [gap for lora, other, target in cases if (gap := gap_closed(rows, target, lora, other))],
        "catch_up": [found for target in targets if (found := catch_up(rows, target))],
    }


def groups(rows: Sequence[Row]) -> list[Row]:
    """Return means and spreads of cells that differ only in their seed, in the order of the cells."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row["policy"], row["sparsity"], row.get("flops"), row["lora"], row["variant"])
        found.setdefault(key, []).append(row)
    return [
        {
            **dict(zip(("policy", "sparsity", "flops", "lora", "variant"), key, strict=True)),
            "seeds": len(members),
            "perplexity": _spread([m["figures"]["perplexity"]["routed"] for m in members]),
            "dense": mean(dense_beside(m, rows) for m in members),
            **{key: _spread_of_known([mean_fidelity(m["figures"], key) for m in members]) for key in ("kl", "top1")},
            "main_kl": _spread_of_known([(m["figures"].get("fidelity") or {}).get("kl") for m in members]),
            "ratio": _spread([m["figures"]["perplexity"]["routed"] / dense_beside(m, rows) for m in members]),
            "realized": _spread([m["figures"]["sparsity"]["realized"] for m in members]),
            "missed": sum(map(_missed, members)),
            "attention": mean(m["figures"]["sparsity"]["attention"] for m in members),
            "ffn": mean(m["figures"]["sparsity"]["ffn"] for m in members),
            "flops_ratio": mean(m["figures"]["flops_ratio"] for m in members),
            "texts_flops_ratio": mean(_texts_flops(m["figures"]) for m in members),
            "seconds": mean(training_seconds(m) for m in members),
        }
        for key, members in found.items()
    ]


def dense_beside(row: Row, rows: Sequence[Row]) -> float:
    """Return the perplexity to compare a cell with: the base's, or with LoRA that of the dense LoRA cell of its seed.

    The dense LoRA cell was trained with the same LoRA budget on the same text; it is compared with itself.
    """
    if row["lora"] and (dense := _plain(rows, DENSE, Target("sparsity", 0.0), True).get(row["seed"])):
        return float(dense["figures"]["perplexity"]["routed"])
    return float(row["figures"]["perplexity"]["dense"])


def gap_closed(rows: Sequence[Row], target: Target, lora: bool, against: str = "skipgpt") -> Row | None:
    """Return how much of another policy's distance from the dense model informed closes, seed by seed.

    Policy `static` has no randomness, so its one cell is used for every seed.

    Returns:
        `closed`, the share of its gap in log-perplexity, and `kl_closed`, the share of its mean KL over the further
        texts (None if an earlier version did not measure it); or None if there is nothing to close.
    """
    informed, other = (_plain(rows, policy, target, lora) for policy in ("informed", against))
    if against == "static" and other:
        other = dict.fromkeys(informed, next(iter(other.values()))) | other
    shares, kls = [], []
    seeds = informed.keys() & other.keys()
    for seed in seeds:
        ours, theirs = (_excess(cells[seed], rows) for cells in (informed, other))
        if theirs > 0:
            shares.append(1 - ours / theirs)
        our_kl, their_kl = (mean_fidelity(cells[seed]["figures"], "kl") for cells in (informed, other))
        kls.append(None if our_kl is None or not their_kl else 1 - our_kl / their_kl)
    if not shares:
        return None
    cells = {"informed": informed, against: other}
    return {
        "against": against,
        **_parts(target),
        "lora": lora,
        "closed": _spread(shares),
        "kl_closed": _spread_of_known(kls),
        "seeds": len(shares),
        "missed": [policy for policy, found in cells.items() if any(_missed(found[seed]) for seed in seeds)],
    }


def catch_up(rows: Sequence[Row], target: Target) -> Row | None:
    """Return the shortest informed training, lff included, whose result is no worse than skipgpt's full training.

    Candidates are the cells of the plain method and of variants that change only how much is trained or read, so the
    resolution is that of the plan's budgets. `share` is the training time over skipgpt's in wall-clock time,
    `cpu_share` in processor time (which other work on the machine does not distort), over the seeds that have such a
    training; `reached` counts them.
    """
    skipgpt = _plain(rows, "skipgpt", target, False)
    shares: dict[str, list[float]] = {"seconds": [], "cpu_seconds": []}
    steps = []
    for seed, full in skipgpt.items():
        wanted = full["figures"]["perplexity"]["routed"]
        tries = [
            row
            for row in rows
            if (row["policy"], _target(row), row["seed"], row["lora"]) == ("informed", target, seed, False)
            and all(change.partition("=")[0].strip() in _BUDGET for change in row["changes"])
        ]
        good = [row for row in tries if row["figures"]["perplexity"]["routed"] <= wanted and not _missed(row)]
        if good:
            best = min(good, key=training_seconds)
            for kind, found in shares.items():
                found.append(training_seconds(best, kind) / training_seconds(full, kind))
            steps.append(best["variant"] or "all steps")
    if not skipgpt or not any(row["policy"] == "informed" for row in rows):
        return None
    return {
        **_parts(target),
        "share": _spread(shares["seconds"]) if steps else None,
        "cpu_share": _spread(shares["cpu_seconds"]) if steps else None,
        "budgets": steps,
        "reached": len(steps),
        "seeds": len(skipgpt),
    }


def _target(row: Row) -> Target | None:
    return target_of(row["sparsity"], row.get("flops"))


def _parts(target: Target) -> dict[str, float | None]:
    return {kind: value_of(target, kind) for kind in TARGET_KINDS}


def _plain(rows: Sequence[Row], policy: str, target: Target, lora: bool) -> dict[int, Row]:
    """Return the cells of a policy without a variant, by seed."""
    wanted = (policy, target, lora, "")
    return {row["seed"]: row for row in rows if (row["policy"], _target(row), row["lora"], row["variant"]) == wanted}


def mean_fidelity(figures: Row, key: str) -> float | None:
    """Return a figure of fidelity, averaged over the further texts, or of the main text where there are none.

    Args:
        figures: Of a cell.
        key: `kl` or `top1`.

    Returns:
        None for a cell of an earlier version, which did not measure it.
    """
    measured = [text["fidelity"][key] for text in figures.get("texts", []) if text.get("fidelity")]
    if not measured and figures.get("fidelity"):
        measured = [figures["fidelity"][key]]
    return mean(measured) if measured else None


def _texts_flops(figures: Row) -> float:
    """Return the FLOPs ratio on the texts that `mean_fidelity` reads."""
    found = [text["flops_ratio"] for text in figures.get("texts", []) if "flops_ratio" in text]
    return mean(found) if found else float(figures["flops_ratio"])


def _spread_of_known(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return _spread(known) if len(known) == len(values) else None


def _missed(row: Row) -> bool:
    """Return whether a cell missed its target; the dense model has none."""
    target = _target(row)
    if row["policy"] == DENSE or target is None:
        return False
    figures = row["figures"]
    found = figures["flops_ratio"] if target.kind == "flops" else figures["sparsity"]["realized"]
    return bool(abs(found - target.value) > TOLERANCE[target.kind])


def _excess(row: Row, rows: Sequence[Row]) -> float:
    """Return a cell's log-perplexity minus that of the dense model."""
    return math.log(row["figures"]["perplexity"]["routed"]) - math.log(dense_beside(row, rows))


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, sample standard deviation (0 for one value), minimum and maximum."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "std": deviation, "min": min(values), "max": max(values)}
