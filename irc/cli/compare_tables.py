"""The tables that irc compare prints."""

from __future__ import annotations

from typing import Any

from irc import console
from irc.compare.labels import flops_of, name_of, note_of, realized_of, target_label, with_spread

_WIDE = 110
_ONLY_WIDE = ("seeds", "top-1", "attention", "FFN")


def comparison_tables(results: dict[str, Any]) -> None:
    """Show a comparison: a row per policy, sparsity and variant, then the gaps and the training times."""
    rows = [
        [
            name_of(group),
            target_label(group),
            flops_of(group),
            str(group["seeds"]),
            None if group["kl"] is None else with_spread(group["kl"]),
            None if group["top1"] is None else with_spread(group["top1"]),
            with_spread(group["perplexity"]),
            f"{group['ratio']['mean']:.4f}",
            realized_of(group),
            f"{group['attention']:.3f}",
            f"{group['ffn']:.3f}",
            f"{group['seconds']:.0f}",
        ]
        for group in results["summary"]["groups"]
    ]
    columns = [
        *("policy", "target", "FLOPs", "seeds", "KL", "top-1", "perplexity", "x dense", "skipped", "attention", "FFN"),
        "seconds",
    ]
    shown = [i for i, name in enumerate(columns) if console.width() >= _WIDE or name not in _ONLY_WIDE]
    console.table(
        f"{results['model']} on {results['data']['name']}",
        [columns[i] for i in shown],
        [[row[i] for i in shown] for row in rows],
    )
    if any(group["lora"] for group in results["summary"]["groups"]):
        console.note(
            "x dense, with LoRA: relative to the dense model that was trained with the same LoRA budget and seed"
        )
    gaps = [
        [
            gap["against"],
            target_label(gap),
            "yes" if gap["lora"] else "no",
            with_spread(gap["kl_closed"], 2) if gap["kl_closed"] else None,
            with_spread(gap["closed"], 2),
            str(gap["seeds"]),
            note_of(gap),
        ]
        for gap in results["summary"]["gaps"]
    ]
    if gaps:
        title = "share of another policy's distance from the dense model that informed closes"
        console.table(title, ["policy", "target", "LoRA", "KL", "log-perplexity", "seeds", ""], gaps)
    caught = [
        [
            target_label(found),
            with_spread(found["share"], 2) if found["share"] else "not reached",
            with_spread(found["cpu_share"], 2) if found["cpu_share"] else None,
            f"{found['reached']} of {found['seeds']}",
        ]
        for found in results["summary"]["catch_up"]
    ]
    if caught:
        title = "shortest informed training that matches skipgpt's result, as a fraction of its time"
        console.table(title, ["target", "wall clock", "processors", "seeds"], caught)
