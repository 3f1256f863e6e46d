"""Tables that convert and eval print."""

from __future__ import annotations

from typing import Any

from irc import console


def conversion_report(metrics: dict[str, Any]) -> None:
    """Show a finished conversion."""
    figures_table("held-out text", metrics)
    seconds = metrics["seconds"]
    console.table("time", ["phase", "seconds"], [[name, f"{value:.1f}"] for name, value in seconds.items()])
    console.say(f"bundle: {metrics['output']}")


def figures_table(title: str, metrics: dict[str, Any]) -> None:
    """Show perplexities, sparsity and FLOPs."""
    perplexity = metrics["perplexity"]
    rows = [["perplexity, dense", f"{perplexity['dense']:.3f}"]]
    if "routed" in perplexity:
        sparsity = metrics["sparsity"]
        target = "" if sparsity["target"] is None else f"  (target {sparsity['target']:.3f})"
        rows += [
            ["perplexity, routed", f"{perplexity['routed']:.3f}  ({perplexity['ratio']:.3f} x dense)"],
            ["sparsity, realized", f"{sparsity['realized']:.3f}{target}"],
            ["  attention units", f"{sparsity['attention']:.3f}"],
            ["  FFN units", f"{sparsity['ffn']:.3f}"],
            ["FLOPs, routed / dense", f"{metrics['flops_ratio']:.3f}"],
        ]
    console.table(title, ["figure", "value"], rows)
