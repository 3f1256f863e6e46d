"""The model card of a bundle: measured figures, how to use it, and how to make it again."""

from __future__ import annotations

from typing import Any

from irc.recipe.policies import policy_named
from irc.recipe.recipe import Recipe, text_name
from irc.recipe.target import NAMES


def model_card(metrics: dict[str, Any], recipe: Recipe) -> str:
    """Return the README.md of a bundle.

    Args:
        metrics: As in metrics.json.
        recipe: Recipe of the conversion, resolved.
    """
    perplexity, sparsity = metrics["perplexity"], metrics["sparsity"]
    fidelity = metrics["fidelity"]
    rows = [
        ("KL(dense, routed), mean and 99th percentile", f"{fidelity['kl']:.3f}, {fidelity['kl_p99']:.2f} nats"),
        ("tokens with the same likeliest successor", f"{fidelity['top1']:.3f}"),
        ("perplexity, dense", f"{perplexity['dense']:.3f}"),
        ("perplexity, routed", f"{perplexity['routed']:.3f} ({perplexity['ratio']:.3f} x dense)"),
        ("matrix-multiply FLOPs, routed over dense", f"{metrics['flops_ratio']:.3f}"),
        (f"{NAMES[recipe.target.kind]}, target", f"{recipe.target.value:.3f}"),
        ("sparsity, realized", f"{sparsity['realized']:.3f}"),
        ("sparsity of attention / FFN", f"{sparsity['attention']:.3f} / {sparsity['ffn']:.3f}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    policy = policy_named(recipe.policy)
    parts = (
        f"Routers and forecasters (rank {recipe.rank}, of FFN units {recipe.ffn_rank})"
        if policy.forecasts
        else "Routers, without forecasters,"
    )
    return (
        f"# {recipe.model}, {policy.name} routing at {recipe.target.value:.0%} {NAMES[recipe.target.kind]}\n\n"
        f"{parts} around every attention and FFN unit of `{recipe.model}`: {policy.summary}. "
        "The base's own weights are not in this folder.\n\n"
        f"Measured on {metrics['data']['tokens']:,} tokens of the {text_name(metrics['data']['split'])} of "
        f"`{recipe.data_name}` in windows of {recipe.window} tokens:\n\n"
        f"| figure | value |\n|---|---|\n{table}\n\n"
        f"{_texts(metrics['texts'])}"
        'Use it:\n\n```python\nimport irc\n\nmodel = irc.load("PATH/OF/THIS/FOLDER")\n```\n\n'
        f"{_options(recipe)}"
        "Make it again: `irc convert --recipe recipe.yaml -o OUTPUT` "
        f"(stages {', '.join(recipe.stages)}, seed {recipe.seed}).\n"
    )


def _texts(texts: list[dict[str, Any]]) -> str:
    """Return the table of further texts, on which nothing was trained or chosen."""
    if not texts:
        return ""
    rows = "\n".join(
        f"| {text['name']} | {text['fidelity']['kl']:.3f} | {text['fidelity']['top1']:.3f} | "
        f"{text['perplexity']['dense']:.2f} | {text['perplexity']['routed']:.2f} | {text['flops_ratio']:.3f} |"
        for text in texts
    )
    return (
        "On other texts, which were neither trained on nor used to choose a setting:\n\n"
        "| text | KL, nats | same top-1 | perplexity, dense | routed | FLOPs |\n|---|---|---|---|---|---|\n"
        f"{rows}\n\n"
    )


def _options(recipe: Recipe) -> str:
    """Return what else a user of the bundle should know, one paragraph each."""
    paragraphs = []
    if recipe.dial:
        kind, own = recipe.target
        ends = (*recipe.dial, own)
        others = "sparsities" if kind == "sparsity" else "FLOPs ratios"
        paragraphs.append(f"Other {others}, from {min(ends):g} to {max(ends):g}: `irc.load(path, {kind}=...)`.")
    if recipe.kv_policy != "full":
        paragraphs.append(f"Keys and values: policy `{recipe.kv_policy}`, threshold {recipe.kv_threshold:g}.")
    if "lora" in recipe.stages:
        paragraphs.append(
            f"LoRA adapters (rank {recipe.lora.rank}) on {', '.join(recipe.lora.targets)} are in `lora/`."
        )
    return "".join(f"{paragraph}\n\n" for paragraph in paragraphs)
