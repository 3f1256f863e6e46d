"""The plot of a bench: speed-up over the share that is skipped, and what it could be at most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from irc.views.svg import BLACK, BLUE, ORANGE, legend, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"prefill": BLUE, "decode": ORANGE}
_MARKS = {"portable": "s", "static": "^"}


def speedup_plot(result: dict[str, Any]) -> str:
    """Return an SVG of a bench's rows, at its first batch size and prompt length.

    Args:
        result: What `irc.bench.bench` returned.
    """
    load = result["load"]
    length, batches = load["prefill"][0], {"prefill": load["batches"][0]}
    batches["decode"] = (load.get("decode_batches") or load["batches"])[0]

    def draw(axes: Axes) -> None:
        for phase, colour in _COLOURS.items():
            rows = [row for row in result["results"] if (row["phase"], row["batch"]) == (phase, batches[phase])]
            rows = [row for row in rows if phase == "decode" or row["tokens"] == length]
            rows.sort(key=lambda row: row["realized"])
            for name in dict.fromkeys(name for row in rows for name in row["contenders"]):
                mine = [row for row in rows if name in row["contenders"]]
                if "ideal" not in mine[0]["contenders"][name]:  # the dense model, or a peer of other work
                    continue
                xs = [row["realized"] for row in mine]
                axes.plot(
                    xs,
                    [row["contenders"][name]["speedup"] for row in mine],
                    color=colour,
                    marker=_MARKS.get(name, "o"),
                    linestyle="none" if name == "static" else "-",
                    label=f"{phase}, {name}",
                )
                if name != "static":
                    axes.plot(xs, [row["contenders"][name]["ideal"] for row in mine], color=colour, linestyle=":")
        axes.axhline(1.0, color=BLACK, linewidth=0.8)
        axes.set(xlabel="share of (token, unit) pairs skipped (dotted: ideal)", ylabel="speed-up over dense")
        legend(axes)

    return svg(draw)
