"""The plots of a comparison, as SVG text (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from irc.compare.labels import target_label
from irc.compare.results import Row, training_seconds
from irc.views.svg import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, legend, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "informed": BLUE,
    "skipgpt": RED,
    "mod": GREEN,
    "random": GREY,
    "static": PINK,
    "static-forecast": ORANGE,
    "dense": BLACK,
}
_KINDS = {"attn": ("attention", SKY), "mlp": ("FFN", ORANGE)}


def kl_over_flops(groups: Sequence[Row], lora: bool) -> list[str]:
    """Plot each policy's KL over its FLOPs ratio: on the text of the comparison, and over the further texts.

    Returns:
        One plot for each, without those that no group has figures of.
    """
    places = (("main_kl", "flops_ratio", "held-out text"), ("kl", "texts_flops_ratio", "mean over the yardstick"))
    drawn = []
    for key, flops, title in places:
        measured = [group for group in groups if group[key] is not None]

        def draw(
            axes: Axes, measured: list[Row] = measured, key: str = key, flops: str = flops, t: str = title
        ) -> None:
            _policies_over_flops(axes, measured, lora, key, flops)
            axes.set(xlabel="FLOPs, routed / dense", ylabel="KL(dense || routed), nats", yscale="log")
            axes.set_title(t, loc="left")
            _plain_ticks(axes)
            legend(axes)

        if measured:
            drawn.append(svg(draw, 4.6, 3.6))
    return drawn


def perplexity_over_flops(groups: Sequence[Row], lora: bool) -> str:
    """Plot each policy's perplexity over its FLOPs ratio, with the spread over seeds."""

    def draw(axes: Axes) -> None:
        _policies_over_flops(axes, groups, lora, "ratio", "flops_ratio")
        axes.axhline(1.0, color=BLACK, linewidth=0.8, linestyle=":")
        axes.set(xlabel="FLOPs, routed / dense", ylabel="perplexity / dense", yscale="log")
        _plain_ticks(axes)
        legend(axes)

    return svg(draw)


def _policies_over_flops(axes: Axes, groups: Sequence[Row], lora: bool, key: str, flops: str) -> None:
    """Draw a line for each policy: a figure with its spread over the FLOPs ratio."""
    for policy, colour in COLOURS.items():
        mine = [g for g in groups if (g["policy"], g["lora"], g["variant"]) == (policy, lora, "")]
        if policy == "dense" or not mine:
            continue
        mine.sort(key=lambda group: group[flops])
        below = [g[key]["mean"] - g[key]["min"] for g in mine]
        above = [g[key]["max"] - g[key]["mean"] for g in mine]
        xs, ys = [g[flops] for g in mine], [g[key]["mean"] for g in mine]
        axes.errorbar(xs, ys, yerr=[below, above], color=colour, marker="o", capsize=3, label=policy)


def perplexity_over_seconds(rows: Sequence[Row], label: str) -> str:
    """Plot perplexity over seconds of training at a target, one line per seed and one point per budget."""

    def draw(axes: Axes) -> None:
        for policy in ("informed", "skipgpt", "mod"):
            mine = [
                row
                for row in rows
                if (row["policy"], target_label(row), row["lora"]) == (policy, label, False)
                and (not row["variant"] or row["swept"] == "router.steps")
            ]
            for seed in sorted({row["seed"] for row in mine}):
                points = sorted(
                    (training_seconds(row, "cpu_seconds"), row["figures"]["perplexity"]["ratio"])
                    for row in mine
                    if row["seed"] == seed
                )
                name = policy if seed == min(row["seed"] for row in mine) else None
                xs, ys = [x for x, _ in points], [y for _, y in points]
                axes.plot(xs, ys, color=COLOURS[policy], marker="o", alpha=0.8, label=name)
        axes.set(xlabel="processor seconds of all stages", ylabel="perplexity / dense", xlim=(0, None), yscale="log")
        axes.set_title(f"target {label}", loc="left")
        _plain_ticks(axes)
        legend(axes)

    return svg(draw, 4.6, 3.4)


def skipped_by_kind(groups: Sequence[Row]) -> str:
    """Plot the share of tokens that attention and FFN units skip, for each policy and target."""

    def draw(axes: Axes) -> None:
        mine = [g for g in groups if not g["lora"] and not g["variant"]]
        places = range(len(mine))
        axes.bar([p - 0.2 for p in places], [g["attention"] for g in mine], 0.38, label="attention", color=SKY)
        axes.bar([p + 0.2 for p in places], [g["ffn"] for g in mine], 0.38, label="FFN", color=ORANGE)
        labels = [f"{g['policy']}\n{target_label(g)}" for g in mine]
        axes.set_xticks(list(places), labels, fontsize=8)
        axes.set(ylabel="share of tokens skipped")
        axes.grid(False, axis="x")
        legend(axes)

    return svg(draw, max(4.6, 0.62 * len(groups)))


def skipped_by_unit(row: Row) -> str:
    """Plot the share of tokens that each unit skips, layer by layer."""

    def draw(axes: Axes) -> None:
        units = row["figures"]["units"]
        for kind, (label, colour) in _KINDS.items():
            shares = [1 - unit["keep_ratio"] for name, unit in units.items() if kind in name.rpartition(".")[2]]
            axes.plot(range(len(shares)), shares, marker="o", color=colour, label=label)
        axes.set(xlabel="layer", ylabel="share skipped", ylim=(-0.02, 1.02))
        axes.set_xticks(range(0, len(shares), max(1, len(shares) // 8)))
        axes.set_title(f"{row['policy']}, target {target_label(row)}", loc="left")
        legend(axes)

    return svg(draw, 4.6, 2.8)


def recoverability(row: Row) -> str:
    """Plot the recoverability of every unit as sorted bars (the paper's first experiment)."""

    def draw(axes: Axes) -> None:
        units = sorted(row["figures"]["units"].items(), key=lambda entry: entry[1]["recoverability"])
        colours = [SKY if "attn" in name.rpartition(".")[2] else ORANGE for name, _ in units]
        axes.barh(range(len(units)), [unit["recoverability"] for _, unit in units], color=colours)
        axes.set_yticks(range(len(units)), [name.removeprefix("model.layers.") for name, _ in units], fontsize=8)
        axes.set(xlabel="mean cosine of forecast and output, held-out text (blue: attention, orange: FFN)")
        axes.grid(False, axis="y")

    return svg(draw, 6.4, max(2.4, 0.2 * len(row["figures"]["units"]) + 0.8))


def sweep(rows: Sequence[Row], key: str, label: str) -> str:
    """Plot perplexity over one swept setting.

    Args:
        rows: Cells whose variant is `key=value`.
        key: Such as `rank`.
        label: Label of the x axis.
    """

    def draw(axes: Axes) -> None:
        points = sorted((int(r["variant"].partition("=")[2]), r["figures"]["perplexity"]["ratio"]) for r in rows)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", color=COLOURS["informed"])
        axes.set(xlabel=label, ylabel="perplexity / dense", xscale="log")
        axes.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
        axes.minorticks_off()
        axes.set_title(f"informed, target {target_label(rows[0])}, seed {rows[0]['seed']}", loc="left")

    return svg(draw, 4.6, 3.0)


def kv_trade_off(sweeps: Sequence[dict[str, Any]]) -> str:
    """Plot perplexity over the share of keys and values that the policy `reduced` saves."""

    def draw(axes: Axes) -> None:
        for found in sweeps:
            points = sorted((row["saved"], row["perplexity"]) for row in found["rows"])
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=f"target {target_label(found)}")
        axes.set(xlabel="share of keys and values saved", ylabel="perplexity")
        legend(axes)

    return svg(draw, 4.6, 3.0)


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    low, high = axes.get_ylim()
    narrow = high / max(low, 1e-9) < 10
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if narrow else NullFormatter())
