"""`irc inspect`: shows the units of a model or bundle, what is inserted around them, and what each one skips."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import click

from irc.cli.options import common_options, files

_WIDE = 100


@click.command()
@click.argument("model", shell_complete=files)
@click.option("--base", metavar="MODEL", help="The bundle's base model, if it has moved.")
@click.option("--graph", "layer", type=int, metavar="LAYER", help="Print the graph of a decoder layer, counted from 0.")
@click.option(
    "--diff",
    "as_diff",
    is_flag=True,
    help="Print what irc changed in the graph of that layer (layer 0 without --graph).",
)
@click.option(
    "--why", "unit", metavar="UNIT", help="Print whether a submodule such as 3.mlp matched as a unit, and why."
)
@click.option(
    "--text",
    metavar="TEXT",
    help="Run the bundle on a text (given as for --data elsewhere) and show its routers' decisions.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Tokens of the text to read.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the decisions to an HTML page.",
)
@common_options
def command(
    model: str,
    as_json: bool,
    base: str | None,
    layer: int | None,
    as_diff: bool,
    unit: str | None,
    text: str | None,
    tokens: int,
    html: Path | None,
) -> None:
    """Show the units of MODEL: a bundle or a plain model (folder, Hub id, or demo).

    For every unit: the fraction of tokens that execute it (keep), the cosine between its forecast and its output
    (recoverability), and its matrix-multiply FLOPs per token, dense and routed.
    """
    from irc import console
    from irc.bundle import loading
    from irc.bundle.source import ModelSource
    from irc.errors import InputError
    from irc.views import inspection

    if html is not None and text is None:
        raise InputError("--html shows the decisions on a text; give one with --text")
    if html is not None and not html.absolute().parent.is_dir():
        raise InputError(f"--html {html}: the folder does not exist; create it or give another path")
    opened = loading.open_model(ModelSource(model, base, device="cpu"))
    texts: dict[str, str] = {}
    if unit is not None:
        texts["why"] = inspection.why(opened, unit)
    if layer is not None:
        texts["graph"] = inspection.layer_graph(opened, layer)
    if as_diff:
        texts["diff"] = inspection.layer_diff(opened, layer or 0)
    routes = _routes(opened, model, text, tokens, html) if text is not None else None
    if as_json:
        console.emit_json(inspection.inspection(opened, model) | texts | ({"routes": routes} if routes else {}))
    elif routes:
        _show_routes(routes, html)
    elif texts:
        _show_texts(texts)
    else:
        _show(inspection.inspection(opened, model))


def _routes(opened: Any, model: str, text: str, tokens: int, html: Path | None) -> dict[str, Any]:
    """Return the routers' decisions on a text; write the page if --html is given."""
    from irc.views.routes import read_routes
    from irc.views.routes_page import write_routes_page

    routes = read_routes(opened, text, tokens)
    return routes.facts() if html is None else write_routes_page(routes, model, text, html)


def _show_routes(routes: dict[str, Any], html: Path | None) -> None:
    from irc import console

    classes = [
        [name, found["tokens"], f"{found['skipped']:.3f}", console.bar(found["skipped"], 20)]
        for name, found in routes["by_class"].items()
    ]
    console.table(
        f"{routes['tokens']} tokens, {routes['skipped']:.3f} skipped", ["token", "count", "skipped", ""], classes
    )
    units = [[name, f"{share:.3f}", console.bar(share, 20)] for name, share in routes["by_unit"].items()]
    console.table("by unit", ["unit", "skipped", ""], units)
    error = routes["error"]
    console.table("mean error of the forecast (1 - cosine)", ["where", "error"], [[k, v] for k, v in error.items()])
    if html is not None:
        console.say(f"page: {html}")


def _show_texts(texts: dict[str, str]) -> None:
    from irc import console

    if "why" in texts:
        console.say(texts["why"])
    if "diff" in texts:
        styles = {"+": "green", "-": "red", "@": "cyan"}
        for line in texts["diff"].splitlines():
            console.say(line, style="bold" if line.startswith(("+++", "---")) else styles.get(line[:1]))
        if not texts["diff"]:
            console.note("no difference: a plain model is not changed")
    elif "graph" in texts:
        for line in texts["graph"].splitlines():
            console.say(line, style=_graph_style(line))


def _graph_style(line: str) -> str | None:
    inserted = line.partition(" = ")[0].endswith(("_forecaster", "_router", "_mux"))
    return "bold" if line.startswith("#") else "green" if inserted else None


def _show(facts: dict[str, Any]) -> None:
    from irc import console

    _show_tree(facts)
    console.say()
    _show_units(facts)
    console.say()
    _show_totals(facts)
    for refusal in facts["refusals"]:
        console.say(f"not a unit: {refusal['name']}: {refusal['reason']}", style="yellow")


def _show_tree(facts: dict[str, Any]) -> None:
    """Show identical layers once, so that a 32-layer model fits on a screen."""
    from irc import console

    content: dict[Any, object] = {}
    layers = [(index, list(units)) for index, units in groupby(facts["units"], key=lambda unit: unit["layer"])]
    for _, alike in groupby(layers, key=lambda layer: [_shape(unit) for unit in layer[1]]):
        group = list(alike)
        (first, units), (last, _) = group[0], group[-1]
        title = f"layer {first}" if first == last else f"layers {first} to {last}, identical"
        content[title] = {_unit_label(unit): _inserted(facts, unit) for unit in units}
    inside = sum(unit["parameters"]["unit"] for unit in facts["units"])
    content[f"outside units  {_short(facts['parameters']['base'] - inside)} parameters"] = None
    console.tree(f"{facts['model']} ({facts['architecture']})", content)


def _shape(unit: dict[str, Any]) -> tuple[Any, ...]:
    name = unit["name"].rpartition(".")[2]
    return name, unit["kind"], unit["hidden"], unit["rank"], unit["router_hidden"], unit["parameters"]


def _unit_label(unit: dict[str, Any]) -> str:
    return f"{unit['name'].rpartition('.')[2]}  {unit['kind']}, {_short(unit['parameters']['unit'])} parameters"


def _inserted(facts: dict[str, Any], unit: dict[str, Any]) -> list[object] | None:
    from irc import console

    if facts["policy"] is None:
        return None
    hidden, rank, router_hidden = unit["hidden"], unit["rank"], unit["router_hidden"]
    shapes = {
        "forecaster": f"{hidden}-{rank}-{hidden} {facts['forecaster']}" if rank else "zero",
        "router": f"{hidden}-{router_hidden}-2" if router_hidden else "",
        "mux": "",
    }
    lines = []
    for role, shape in shapes.items():
        size = unit["parameters"][role]
        parts = ["+", role, shape, f" {_short(size)} parameters" if size else ""]
        lines.append(console.Styled(" ".join(part for part in parts if part), "green"))
    return list(lines)


def _show_units(facts: dict[str, Any]) -> None:
    from irc import console

    rows: list[list[object]] = []
    size = 16 if console.width() >= _WIDE else 7
    for unit in facts["units"]:
        name = ".".join(unit["name"].rsplit(".", 2)[1:])
        flops = unit["flops"]
        row: list[object] = [name, f"{_short(flops['dense']):>5}"]
        if facts["policy"] is not None:
            keep, recoverability = unit["keep_ratio"], unit["recoverability"]
            row[1:1] = [
                _measure(keep, size, None if keep is None else 1 - keep),
                _measure(recoverability, size, recoverability),
            ]
            row.append(f"{_short(flops['routed']):>6}")
        rows.append(row)
    if facts["policy"] is None:
        console.table("units, FLOPs per token", ["unit", "dense"], rows)
    else:
        console.table("units, FLOPs per token", ["unit", "keep", "recoverability", "dense", "routed"], rows)


def _measure(value: float | None, size: int, goodness: float | None) -> object:
    from irc import console

    if value is None or goodness is None:
        return None
    return console.Styled(f"{value:.3f} {console.bar(value, size)}", console.shade(goodness))


def _show_totals(facts: dict[str, Any]) -> None:
    from irc import console
    from irc.cli.report import shown_target

    counts, flops, sparsity = facts["parameters"], facts["flops"], facts["sparsity"]
    rows = [["base parameters", f"{counts['base']:,}"]]
    if facts["policy"] is not None:
        share = counts["inserted"] / max(1, counts["base"])
        rows.append(["inserted parameters", f"{counts['inserted']:,}  ({share:.2%} of the base)"])
    if "lora" in counts:
        rows.append(["LoRA parameters", f"{counts['lora']:,}  (merged at export)"])
    if sparsity is not None:
        rows.insert(0, ["FLOPs, routed / dense", f"{facts['flops_ratio']:.4f}{shown_target(facts, 'flops')}"])
        rows += [
            ["sparsity, nominal", f"{sparsity['realized']:.3f}{shown_target(facts, 'sparsity')}"],
            ["  attention units", f"{sparsity['attention']:.3f}"],
            ["  FFN units", f"{sparsity['ffn']:.3f}"],
        ]
    rows.append(["FLOPs per token, dense", f"{_short(flops['dense'])}  (head {_short(flops['head'])})"])
    if facts["policy"] is not None:
        rows.append(["FLOPs per token, routed", _short(flops["routed"])])
    console.table(f"totals, windows of {facts['seq_len']:,} tokens", ["figure", "value"], rows)


def _short(number: float | None) -> str:
    """Format a count with three digits: 786k, 1.05M, 83.9G."""
    if number is None:
        return "-"
    letters = iter("kMGT")
    letter = ""
    while number >= 999.5:
        number, letter = number / 1000, next(letters)
    digits = 0 if not letter or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{letter}"
