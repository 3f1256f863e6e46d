"""The tables that irc convert and irc eval print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from irc import console
from irc.evaluation.figures import worst_text
from irc.recipe.recipe import text_name

_WIDE = 100


def conversion_report(metrics: dict[str, Any]) -> None:
    """Show a finished conversion."""
    name = text_name(metrics["data"]["split"])
    texts_table(name, metrics)
    figures_table(name, metrics)
    seconds = metrics["seconds"]
    console.table("time", ["phase", "seconds"], [[name, f"{value:.1f}"] for name, value in seconds.items()])
    console.say(f"bundle: {metrics['output']}")


def figures_table(title: str, metrics: dict[str, Any]) -> None:
    """Show perplexities, sparsity and FLOPs."""
    perplexity = metrics["perplexity"]
    rows = [["perplexity, dense", f"{perplexity['dense']:.3f}"]]
    if "routed" in perplexity:
        sparsity = metrics["sparsity"]
        rows.insert(0, ["FLOPs, routed / dense", f"{metrics['flops_ratio']:.3f}{shown_target(metrics, 'flops')}"])
        rows += [
            ["perplexity, routed", f"{perplexity['routed']:.3f}  ({perplexity['ratio']:.3f} x dense)"],
            ["sparsity, realized", f"{sparsity['realized']:.3f}{shown_target(metrics, 'sparsity')}"],
            ["  attention units", f"{sparsity['attention']:.3f}"],
            ["  FFN units", f"{sparsity['ffn']:.3f}"],
            *kv_rows(metrics["kv"]),
        ]
    console.table(title, ["figure", "value"], rows)


def texts_table(main: str, metrics: dict[str, Any]) -> None:
    """Show how close the routed model stays to the dense one on every text, and mark the text where it is furthest.

    Args:
        main: What to call the main text.
        metrics: Of a conversion or an evaluation.
    """
    if "fidelity" not in metrics:
        rows = [[text["name"], f"{text['perplexity']['dense']:.3f}"] for text in metrics["texts"]]
        if rows:
            console.table("further texts", ["text", "perplexity"], rows)
        return
    texts = [{**metrics, "name": main}, *metrics["texts"]]
    worst = worst_text(texts) if len(texts) > 1 else None
    console.table(
        "fidelity: KL(dense || routed) in nats a token, and share of tokens with the same likeliest successor",
        ["text", "KL", "99th percentile", "same top-1", "perplexity", "routed", "ratio", "FLOPs"],
        [_fidelity_row(text, text["name"] == worst) for text in texts],
    )
    if any(text["perplexity"]["ratio"] < 1 for text in texts):
        console.say("* under 1: the model has adapted to this kind of text while it was trained; it is not better")


def _fidelity_row(text: dict[str, Any], is_worst: bool) -> list[object]:
    fidelity, perplexity = text["fidelity"], text["perplexity"]
    low, high = fidelity["kl_p99_interval"]
    interval = f" ({low:.2f} to {high:.2f})" if console.width() >= _WIDE else ""
    return [
        console.Styled(f"{text['name']} (worst)", "bold") if is_worst else text["name"],
        f"{fidelity['kl']:.3f}",
        f"{fidelity['kl_p99']:.2f}{interval}",
        f"{fidelity['top1']:.3f}",
        f"{perplexity['dense']:.2f}",
        f"{perplexity['routed']:.2f}",
        f"{perplexity['ratio']:.3f}{' *' if perplexity['ratio'] < 1 else ''}",
        f"{text['flops_ratio']:.3f}",
    ]


def folder_report(metrics: dict[str, Any]) -> None:
    """Show how close an ONNX folder stays to the dense model in fp32, on every text."""
    sides_table(metrics["side"], [{**metrics, "name": metrics["data"]["name"]}, *metrics["texts"]])


def sides_table(own: str, texts: Sequence[dict[str, Any]]) -> None:
    """Show how far a folder, and what lies between it and the dense model, are from the dense model in fp32.

    Args:
        own: What the folder is, such as `routed int4`.
        texts: Objects of the JSON key `texts` of `irc eval` for a folder.
    """
    rows: list[list[object]] = []
    for text in texts:
        sides = [*text["between"], {"name": own, **{key: text[key] for key in ("fidelity", "perplexity")}}]
        for place, side in enumerate(sides):
            last = place + 1 == len(sides)
            fidelity, perplexity = side["fidelity"], side["perplexity"]
            rows.append(
                [
                    "" if place else text["name"],
                    console.Styled(side["name"], "bold") if last else side["name"],
                    f"{fidelity['kl']:.3f}",
                    f"{fidelity['kl_p99']:.2f}",
                    f"{fidelity['top1']:.3f}",
                    f"{perplexity['routed']:.2f}",
                    f"{perplexity['ratio']:.3f}",
                    f"{text['flops_ratio']:.3f}" if last else "",
                ]
            )
    console.table(
        "distance from the dense model in fp32: KL in nats a token, share of tokens with the same likeliest successor",
        ["text", "model", "KL", "99th percentile", "same top-1", "perplexity", "x dense", "FLOPs"],
        rows,
    )


def shown_target(figures: dict[str, Any], kind: str) -> str:
    """Return the target as it follows a realized value; empty if the target is of the other kind or unknown."""
    value = (figures.get("target") or {"sparsity": figures["sparsity"]["target"]}).get(kind)
    return "" if value is None else f"  (target {value:.3f})"


def kv_rows(kv: dict[str, Any]) -> list[list[str]]:
    """Return the row about keys and values; empty under policy `full`."""
    if kv["policy"] == "full":
        return []
    units = f"{kv['reduced_units']} attention units, threshold {kv['threshold']:g}"
    return [["keys and values saved", f"{kv['saved']:.3f}  ({units})"]]


def kv_report(metrics: dict[str, Any]) -> None:
    """Show a sweep over thresholds of the key/value policy, as a table and a plot."""
    dense, sweep = metrics["perplexity"]["dense"], metrics["kv_sweep"]
    rows = [
        [
            f"{row['threshold']:g}",
            str(row["reduced_units"]),
            f"{row['saved']:.3f}",
            console.bar(row["saved"], 16),
            f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / dense:.3f}",
        ]
        for row in sweep
    ]
    columns = ["threshold", "reduced units", "memory saved", "", "perplexity", "x dense"]
    console.table("keys and values of skipped tokens", columns, rows)
    points = [(row["saved"], row["perplexity"], "*") for row in sweep]
    console.plot("perplexity over memory saved", "share of keys and values saved", "perplexity", points)


def dial_report(metrics: dict[str, Any], name: str) -> None:
    """Show a sweep over the dial, `sparsity_sweep` or `flops_sweep`, as a table and a plot."""
    dense, sweep = metrics["perplexity"]["dense"], metrics[name]
    rows = [
        [
            *(f"{row['target']:g}", f"{row['flops_ratio']:.3f}", f"{row['realized']:.3f}"),
            *(console.bar(row["realized"], 16), f"{row['kl']:.3f}", f"{row['top1']:.3f}"),
            *(f"{row['perplexity']:.3f}", f"{row['perplexity'] / dense:.3f}"),
        ]
        for row in sweep
    ]
    title = "sparsity sweep" if name == "sparsity_sweep" else "FLOPs sweep"
    console.table(title, ["target", "FLOPs", "skipped", "", "KL", "same top-1", "perplexity", "x dense"], rows)
    points = [(row["flops_ratio"], row["kl"], "*") for row in sweep]
    console.plot("KL over FLOPs", "FLOPs, routed / dense", "KL(dense || routed)", points)


def tasks_report(results: dict[str, Any]) -> None:
    """Show task results, dense and routed side by side."""
    rows: list[list[object]] = []
    for task, sides in results["tasks"].items():
        first = next(iter(sides.values()))
        for metric in first:
            if metric == "questions" or metric.endswith("_stderr"):
                continue
            error = first.get(f"{metric}_stderr")
            shown = [f"{sides[side][metric]:.3f}" if side in sides else None for side in ("dense", "routed")]
            rows.append([task, metric, first["questions"], *shown, None if error is None else f"{error:.3f}"])
    console.table(f"tasks, {results['backend']}", ["task", "figure", "questions", "dense", "routed", "error"], rows)
    if results["sparsity"]["realized"] is not None:
        console.say(f"skipped (token, unit) pairs, without padding: {results['sparsity']['realized']:.3f}")


def dry_run_report(plan: dict[str, Any]) -> None:
    """Show the estimated cost of a conversion."""
    rows = [[phase["name"], console.duration(phase["seconds"])] for phase in plan["phases"]]
    rows.append(["total", console.duration(plan["seconds"])])
    console.table("estimated time, from two steps of each stage", ["phase", "time"], rows)
    kinds = [
        [
            kind,
            f"{plan[kind]['needed_mib']:,} MiB",
            f"{plan[kind]['free_mib']:,} MiB",
            "yes" if plan[kind]["fits"] else "no",
        ]
        for kind in ("memory", "disk")
    ]
    console.table("space", ["", "needed", "free", "fits"], kinds)
    for kind, remedy in (
        ("memory", "try a smaller batch or activation_checkpointing=true"),
        ("disk", "free some space"),
    ):
        if not plan[kind]["fits"]:
            console.say(f"not enough {kind}; {remedy}")
