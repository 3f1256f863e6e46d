"""Describes a model for `irc inspect`: its units, parameters, FLOPs, graphs and refusals, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from irc.bundle.config import UnitFigures
from irc.bundle.contents import Bundle, bundle_of
from irc.bundle.layout import METRICS
from irc.errors import InputError
from irc.files.untrusted import parse_json
from irc.model.build import build_plain
from irc.model.flops import UnitFlops, flops_ratio, head_flops, unit_flops
from irc.model.modules import Forecaster, Router
from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import Recipe
from irc.recipe.target import Target, value_of
from passes.match import Unit
from passes.printer import named_lines, unified_diff

INSERTED_ROLES = ("forecaster", "router", "mux")


def inspection(model: RoutedForCausalLM, name: str) -> dict[str, Any]:
    """Return the JSON object that `irc inspect` prints.

    FLOPs are per token, in a window as long as those of the conversion (`seq_len`). A figure is None when the bundle
    did not measure it or when a plain model does not have it.

    Args:
        model: A bundle or a plain model, as `irc.bundle.loading.open_model` returns it.
        name: The model as the user named it.
    """
    bundle = bundle_of(model)
    measured = {} if bundle is None else bundle.config.measured.units
    target = None if bundle is None else bundle.config.measured.target
    keep = _keep(model, measured)
    seq_len = _seq_len(model, bundle)
    counts = unit_flops(model, seq_len)
    units = [
        _unit_facts(model, unit, counts[unit.name], measured.get(unit.name, UnitFigures()), keep)
        for unit in model.units
    ]
    head = head_flops(model)
    routed = None if keep is None else head + sum(counts[unit].routed(share) for unit, share in keep.items())
    return {
        "model": name,
        "base": name if bundle is None else bundle.config.base.name,
        "architecture": model.config.model_type,
        "policy": model.spec.policy if model.spec else None,
        "forecaster": model.spec.forecaster if model.spec else None,
        "layers": len({unit.layer for unit in model.units}),
        "seq_len": seq_len,
        "parameters": parameters(model),
        "target": None if target is None else target.to_dict(),
        "sparsity": _sparsity(model, keep, target),
        "fidelity": _fidelity(bundle),
        "flops": {"head": head, "dense": head + sum(count.dense for count in counts.values()), "routed": routed},
        "flops_ratio": None if keep is None else flops_ratio(model, keep, seq_len),
        "units": units,
        "refusals": [{"name": refusal.name, "reason": refusal.reason} for refusal in model.match.refusals],
    }


def parameters(model: RoutedForCausalLM) -> dict[str, int]:
    """Count the parameters of the base and of the inserted modules, and of the LoRA adapters if there are any."""
    lora = sum(p.numel() for name, p in model.graph.named_parameters() if "lora_" in name)
    inserted = 0
    if model.spec is not None:
        inserted = sum(_size(model.part(unit, role)) for unit in model.units for role in INSERTED_ROLES)
    counts = {"base": _size(model.graph) - inserted, "inserted": inserted}
    return counts | ({"lora": lora} if lora else {})


def layer_graph(model: RoutedForCausalLM, layer: int) -> str:
    """Return the graph of one decoder layer as text, one line per node.

    Raises:
        InputError: The model has no such layer.
    """
    path = _block(model, layer)
    return f"# {path}\n{named_lines(_graph(model, path))}"


def layer_diff(model: RoutedForCausalLM, layer: int) -> str:
    """Return a unified diff from a layer's graph in the base, captured again, to its graph in this model.

    The diff is empty for a plain model.

    Raises:
        InputError: The model has no such layer.
    """
    path = _block(model, layer)
    if model.spec is None:
        return ""
    original = build_plain(model.base, str(model.dtype).removeprefix("torch."))
    return unified_diff(named_lines(_graph(original, path)), named_lines(_graph(model, path)))


def why(model: RoutedForCausalLM, name: str) -> str:
    """Explain in one sentence why the matcher accepted or rejected a submodule.

    Args:
        model: Plain or rewritten.
        name: Path of the submodule or the end of its path, such as `3.mlp`.

    Raises:
        InputError: The matcher saw no submodule of that name.
    """
    known = [unit.name for unit in model.match.units] + [refusal.name for refusal in model.match.refusals]
    if not any(path == name or path.endswith(f".{name}") for path in known):
        examples = ", ".join(known[:2]) + (f" to {known[-1]}" if len(known) > 2 else "")
        raise InputError(f"{name}: unknown submodule; choose one of the {len(known)} known: {examples or 'none'}")
    return model.match.why(name)


def _unit_facts(
    model: RoutedForCausalLM, unit: Unit, count: UnitFlops, measured: UnitFigures, keep: dict[str, float] | None
) -> dict[str, Any]:
    rank = router_hidden = None
    sizes = {"unit": _size(model.graph.get_submodule(unit.name))}
    if model.spec is not None:
        sizes |= {role: _size(model.part(unit, role)) for role in INSERTED_ROLES}
        forecaster, router = model.part(unit, "forecaster"), model.part(unit, "router")
        rank = forecaster.down.out_features if isinstance(forecaster, Forecaster) else None
        first = router[0] if isinstance(router, Router) else None
        router_hidden = first.out_features if isinstance(first, nn.Linear) else None
    return {
        "name": unit.name,
        "kind": unit.kind,
        "layer": unit.layer,
        "hidden": unit.width,
        "rank": rank,
        "router_hidden": router_hidden,
        "keep_ratio": measured.keep_ratio,
        "recoverability": measured.recoverability,
        "flops": {"dense": count.dense, "routed": None if keep is None else count.routed(keep[unit.name])},
        "parameters": sizes,
    }


def _keep(model: RoutedForCausalLM, measured: Mapping[str, UnitFigures]) -> dict[str, float] | None:
    """Return the share of tokens that each unit executes, or None if the bundle has no measurement."""
    if model.spec is None:
        return {unit.name: 1.0 for unit in model.units}
    shares = {}
    for unit in model.units:
        share = measured.get(unit.name, UnitFigures()).keep_ratio
        if share is None:
            return None
        shares[unit.name] = share
    return shares


def _sparsity(
    model: RoutedForCausalLM, keep: dict[str, float] | None, target: Target | None
) -> dict[str, float | None] | None:
    if model.spec is None or keep is None:
        return None
    skipped: dict[str, list[float]] = {"realized": [], "attention": [], "ffn": []}
    for unit in model.units:
        skipped["realized"].append(1 - keep[unit.name])
        skipped[unit.kind].append(1 - keep[unit.name])
    means = {kind: sum(shares) / len(shares) if shares else 0.0 for kind, shares in skipped.items()}
    return {"target": value_of(target, "sparsity"), **means}


def _fidelity(bundle: Bundle | None) -> dict[str, float] | None:
    """Return the fidelity that the conversion measured on its text; None if it is not known."""
    try:
        found = None if bundle is None else parse_json(bundle.texts[METRICS])["fidelity"]
        return found and {key: float(found[key]) for key in ("kl", "kl_p99", "top1")}
    except (KeyError, TypeError, ValueError):  # made by an earlier version, or changed since it was measured
        return None


def _seq_len(model: RoutedForCausalLM, bundle: Bundle | None) -> int:
    """Return the tokens per window as in `irc eval`: those of the conversion, or the default cut to the context."""
    recorded = None if bundle is None else bundle.config.measured.text.seq_len
    return int(recorded or Recipe().seq_len_for(getattr(model.config, "max_position_embeddings", None)))


def _block(model: RoutedForCausalLM, layer: int) -> str:
    blocks = {unit.layer: unit.block for unit in model.units}
    if layer not in blocks:
        layers = f"0 to {max(blocks)}" if blocks else "none"
        raise InputError(f"layer {layer}: the model has no such layer; its layers are {layers}")
    return blocks[layer]


def _graph(model: RoutedForCausalLM, path: str) -> fx.Graph:
    graph = model.graph.get_submodule(path).graph
    assert isinstance(graph, fx.Graph)
    return graph


def _size(module: nn.Module) -> int:
    """Count the parameters of a module without LoRA adapters; tied parameters count once."""
    return sum(parameter.numel() for name, parameter in module.named_parameters() if "lora_" not in name)
