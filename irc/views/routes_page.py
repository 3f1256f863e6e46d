"""Writes the HTML page of `irc inspect --text`, which shows the routers' decisions on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from irc.views.html import render
from irc.views.routes import Routes
from irc.views.svg import BLUE, ORANGE, legend, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).with_name("routes.html.j2")
_GROUPS = 32


def write_routes_page(routes: Routes, model: str, text: str, path: Path) -> dict[str, Any]:
    """Write the page.

    Args:
        routes: Decisions on one text.
        model: The bundle as the user named it.
        text: The text as the user named it.
        path: Path of the HTML file.

    Returns:
        The figures that the page shows, as `Routes.facts` returns them.

    Raises:
        InputError: matplotlib or jinja2 is not installed.
    """
    facts = routes.facts()
    data = {
        "tokens": routes.tokens,
        "units": [name.removeprefix("model.layers.") for name in routes.units],
        "execute": ["".join("1" if bit else "0" for bit in row) for row in routes.execute.tolist()],
        "confidence": (routes.confidence * 100).round().int().tolist(),
        "error": (routes.error * 100).round().int().tolist(),
    }
    plots = [
        ("Skipped by position", _plot_by_position(routes)),
        ("Skipped by token class", _plot_by_class(facts)),
        ("Confidence of the routers", _plot_confidence(routes)),
        ("Forecast error of each unit that routes", _plot_error(facts)),
    ]
    path.write_text(render(TEMPLATE, model=model, text=text, facts=facts, data=data, plots=plots), encoding="utf-8")
    return facts


def _plot_by_position(routes: Routes) -> str:
    def draw(axes: Axes) -> None:
        count = min(_GROUPS, len(routes.tokens))
        for kind, label, colour in (("attention", "attention", BLUE), ("ffn", "FFN", ORANGE)):
            units = [index for index, unit_kind in enumerate(routes.kinds) if unit_kind == kind]
            groups = (1 - routes.execute[units].double().mean(0)).tensor_split(count)
            ends = torch.tensor([len(group) for group in groups]).cumsum(0)
            middles = [end.item() - len(group) / 2 for end, group in zip(ends, groups, strict=True)]
            axes.plot(middles, [group.mean().item() for group in groups], label=label, color=colour)
        axes.set(xlabel="token position", ylabel="share of units skipped", ylim=(0, 1))
        legend(axes)

    return svg(draw, 4.6, 2.8)


def _plot_by_class(facts: dict[str, Any]) -> str:
    def draw(axes: Axes) -> None:
        classes = list(facts["by_class"].items())[::-1]
        axes.barh(range(len(classes)), [entry["skipped"] for _, entry in classes], color=BLUE)
        axes.set_yticks(range(len(classes)), [f"{name} ({entry['tokens']})" for name, entry in classes])
        axes.set(xlabel="share of (token, unit) pairs skipped", xlim=(0, 1))
        axes.grid(False, axis="y")

    return svg(draw, 4.6, 2.8)


def _plot_confidence(routes: Routes) -> str:
    def draw(axes: Axes) -> None:
        sides = [routes.confidence[routes.execute].tolist(), routes.confidence[~routes.execute].tolist()]
        axes.hist(sides, bins=25, range=(0.5, 1.0), stacked=True, color=[BLUE, ORANGE], label=["executed", "skipped"])
        axes.set(xlabel="probability of the chosen route", ylabel="(token, unit) pairs")
        legend(axes)

    return svg(draw, 4.6, 2.8)


def _plot_error(facts: dict[str, Any]) -> str:
    """Draw a row for each unit that executes some tokens and skips others."""
    both = {
        name.removeprefix("model.layers."): error
        for name, error in facts["error_by_unit"].items()
        if error["executed"] is not None and error["skipped"] is not None
    }

    def draw(axes: Axes) -> None:
        rows = range(len(both), 0, -1)
        for side, colour in (("executed", BLUE), ("skipped", ORANGE)):
            axes.scatter([error[side] for error in both.values()], rows, color=colour, label=side, s=24, zorder=3)
        for row, error in zip(rows, both.values(), strict=True):
            axes.plot([error["executed"], error["skipped"]], [row, row], color="grey", linewidth=1)
        axes.set_yticks(list(rows), list(both))
        axes.set(xlabel="mean of 1 - cosine between forecast and unit output")
        legend(axes)

    return svg(draw, 4.6, max(1.6, 0.9 + 0.17 * len(both)))
