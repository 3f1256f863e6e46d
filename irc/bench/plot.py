"""Plots the results of `irc bench`: measured and ideal speed-up over the skipped share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from irc.views.svg import BLACK, BLUE, ORANGE, legend, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"prefill": BLUE, "decode": ORANGE}
_MARKS = {"portable": "s", "static": "^"}


def speedup_plot(result: dict[str, Any]) -> str:
    """Return a plot of the results at the first batch size and prompt length, as SVG text.

    Args:
        result: The result of `irc.bench.bench`.
    """
    load = result["load"]
    length = load["prefill"][0]
    batches = {"prefill": load["batches"][0], "decode": (load.get("decode_batches") or load["batches"])[0]}

    def draw(axes: Axes) -> None:
        for phase, colour in _COLOURS.items():
            rows = [row for row in result["results"] if (row["phase"], row["batch"]) == (phase, batches[phase])]
            rows = [row for row in rows if phase == "decode" or row["tokens"] == length]
            rows.sort(key=lambda row: row["realized"])
            for name in dict.fromkeys(name for row in rows for name in row["contenders"]):
                of_name = [row for row in rows if name in row["contenders"]]
                figures = [row["contenders"][name] for row in of_name]
                if "ideal" not in figures[0]:  # the dense model, or another runtime of it
                    continue
                xs = [row["realized"] for row in of_name]
                axes.plot(
                    xs,
                    [figure["speedup"] for figure in figures],
                    color=colour,
                    marker=_MARKS.get(name, "o"),
                    linestyle="none" if name == "static" else "-",
                    label=f"{phase}, {name}",
                )
                if name != "static":
                    axes.plot(xs, [figure["ideal"] for figure in figures], color=colour, linestyle=":")
        axes.axhline(1.0, color=BLACK, linewidth=0.8)
        axes.set(xlabel="share of (token, unit) pairs skipped (dotted: ideal)", ylabel="speed-up over dense")
        legend(axes)

    return svg(draw)
