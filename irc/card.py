"""The model card of a bundle: measured figures, and how to use and to make it again."""

from __future__ import annotations

from typing import Any

from irc.config import Recipe, text_name


def model_card(metrics: dict[str, Any], recipe: Recipe) -> str:
    """Return the README.md of a bundle.

    Args:
        metrics: As in metrics.json.
        recipe: Resolved recipe.
    """
    perplexity, sparsity = metrics["perplexity"], metrics["sparsity"]
    rows = [
        ("perplexity, dense", f"{perplexity['dense']:.3f}"),
        ("perplexity, routed", f"{perplexity['routed']:.3f} ({perplexity['ratio']:.3f} x dense)"),
        ("sparsity, target", f"{recipe.sparsity:.3f}"),
        ("sparsity, realized", f"{sparsity['realized']:.3f}"),
        ("sparsity of attention / FFN", f"{sparsity['attention']:.3f} / {sparsity['ffn']:.3f}"),
        ("matrix-multiply FLOPs, routed over dense", f"{metrics['flops_ratio']:.3f}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"# {recipe.model}, informed routing at {recipe.sparsity:.0%} sparsity\n\n"
        f"Routers and forecasters (rank {recipe.rank}) round every attention and FFN unit of `{recipe.model}`. "
        "The base's own weights are not in this folder.\n\n"
        f"Measured on {metrics['data']['tokens']:,} tokens of the {text_name(metrics['data']['split'])} of "
        f"`{recipe.data}` in windows of {recipe.seq_len}:\n\n"
        f"| figure | value |\n|---|---|\n{table}\n\n"
        'Use it:\n\n```python\nimport irc\n\nmodel = irc.load("PATH/OF/THIS/FOLDER")\n```\n\n'
        "Make it again: `irc convert --recipe recipe.yaml -o OUTPUT` "
        f"(stages {', '.join(recipe.stages)}, seed {recipe.seed}).\n"
    )
