"""Writes the HTML report of a comparison: figures, tables and plots in one file that loads nothing else."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from irc.compare import plots
from irc.compare.labels import flops_of, missed_in, name_of, note_of, realized_of, target_label, with_spread
from irc.compare.results import Row
from irc.errors import InputError
from irc.views.html import render

TEMPLATE = Path(__file__).with_name("report.html.j2")


def check_tools() -> None:
    """Check, before hours of training, that a report can be written.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
    """
    for module, wanted in (("matplotlib", "plots need matplotlib"), ("jinja2", "HTML pages need jinja2")):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{wanted}; install it with: pip install 'informed-routing-compiler[report]'")


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the report of a comparison.

    Args:
        results: As returned by `irc.compare.run.compare`.
        path: Of the HTML file.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
    """
    text = render(
        TEMPLATE,
        results=results,
        sections=list(_sections(results)),
        name=name_of,
        spread=with_spread,
        note=note_of,
        flops=flops_of,
        realized=realized_of,
        missed_in=missed_in,
        target=target_label,
        tokens=f"{results['cells'][0]['figures']['tokens']:,}",
        split=results["recipe"]["eval_split"],
        recipe=yaml.safe_dump(results["recipe"], sort_keys=False),
    )
    path.write_text(text, encoding="utf-8")


def _sections(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield title, text and plots of each section that the plan has cells for."""
    rows: list[Row] = results["cells"]
    groups: list[Row] = results["summary"]["groups"]
    for lora in (False, True):
        if any(group["lora"] == lora and group["policy"] != "dense" for group in groups):
            after = " after LoRA" if lora else ""
            if drawn := plots.kl_over_flops(groups, lora):
                yield _section(
                    f"Fidelity over FLOPs{after}", "Lower is nearer to the dense model. Bars span the seeds.", drawn
                )
            drawn = [plots.perplexity_over_flops(groups, lora)]
            yield _section(f"Perplexity over FLOPs{after}", "Bars span the seeds.", drawn)
    budgets = dict.fromkeys(target_label(row) for row in rows if row["swept"] == "router.steps")
    if budgets:
        text = "Each point is a separate training with its own schedule; those of informed include the lff stage."
        timed = [plots.perplexity_over_seconds(rows, label) for label in budgets]
        yield _section("Perplexity over training time", text, timed)
    yield _section("Skipped tokens: attention and FFN", "", [plots.skipped_by_kind(groups)])
    first = [row for row in rows if row["seed"] == rows[0]["seed"] and not (row["variant"] or row["lora"])]
    routed = [row for row in first if row["policy"] in ("informed", "skipgpt", "static", "static-forecast")]
    yield _section("Skipped tokens by layer", "First seed.", [plots.skipped_by_unit(row) for row in routed])
    informed = [row for row in first if row["policy"] == "informed"]
    if informed:
        text = "How well the trained forecaster of each unit replaces it, measured while every unit executes."
        yield _section("Recoverability of each unit", text, [plots.recoverability(informed[0])])
    for key, title, label in (
        ("rank", "Forecaster rank", "rank of all units"),
        ("lff.tokens", "Size of the calibration text", "tokens of the lff stage"),
    ):
        swept = [row for row in rows if row["swept"] == key]
        if swept:
            yield _section(title, "", [plots.sweep(swept, key, label)])
    if results["kv_sweep"]:
        text = "Under the key/value policy reduced, attention units that skip often store nothing for skipped tokens."
        yield _section("Keys and values saved", text, [plots.kv_trade_off(results["kv_sweep"])])


def _section(title: str, text: str, drawn: list[str]) -> dict[str, Any]:
    return {"title": title, "text": text, "plots": drawn}
