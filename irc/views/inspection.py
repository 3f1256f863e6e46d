"""What `irc inspect` knows of a model: units, parameters, FLOPs, graphs and refusals, as plain data."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from irc.errors import InputError
from irc.model.build import build_plain
from irc.model.checkpoint import BaseModel
from irc.model.flops import UnitFlops, flops_ratio, head_flops, unit_flops
from irc.model.modules import Forecaster, Router
from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import Recipe
from passes.match import Unit
from passes.printer import named_lines, unified_diff

INSERTED = ("forecaster", "router", "mux")


def inspection(model: RoutedForCausalLM, name: str) -> dict[str, Any]:
    """Return the JSON object of `irc inspect`.

    FLOPs are per token of a window as long as those of the conversion (`seq_len`). What a bundle did not
    measure, and what a plain model does not have, is None.

    Args:
        model: A bundle or a plain model, as `irc.evaluation.run.open_model` returns it.
        name: What the user called it.
    """
    config: dict[str, Any] = model.facts.get("config", {})
    measured = {unit["name"]: unit for unit in config.get("units", [])}
    keep = _keep(model, measured)
    seq_len = _seq_len(model, config)
    counts = unit_flops(model, seq_len)
    units = [_unit_facts(model, unit, counts[unit.name], measured.get(unit.name, {}), keep) for unit in model.units]
    head = head_flops(model)
    routed = None if keep is None else head + sum(counts[unit].routed(share) for unit, share in keep.items())
    return {
        "model": name,
        "base": config["base"]["name"] if config else name,
        "architecture": model.config.model_type,
        "policy": model.spec.policy if model.spec else None,
        "forecaster": model.spec.forecaster if model.spec else None,
        "layers": len({unit.layer for unit in model.units}),
        "seq_len": seq_len,
        "parameters": parameters(model),
        "sparsity": _sparsity(model, keep, config),
        "flops": {"head": head, "dense": head + sum(count.dense for count in counts.values()), "routed": routed},
        "flops_ratio": None if keep is None else flops_ratio(model, keep, seq_len),
        "units": units,
        "refusals": [{"name": refusal.name, "reason": refusal.reason} for refusal in model.match.refusals],
    }


def parameters(model: RoutedForCausalLM) -> dict[str, int]:
    """Count the parameters of the base and of what was inserted; `lora` too where it was trained."""
    lora = sum(p.numel() for name, p in model.graph.named_parameters() if "lora_" in name)
    inserted = 0
    if model.spec is not None:
        inserted = sum(_size(model.part(unit, role)) for unit in model.units for role in INSERTED)
    counts = {"base": _size(model.graph) - inserted, "inserted": inserted}
    return counts | ({"lora": lora} if lora else {})


def layer_graph(model: RoutedForCausalLM, layer: int) -> str:
    """Return the text of one decoder layer's graph, one line a node.

    Raises:
        InputError: The model has no such layer.
    """
    path = _block(model, layer)
    return f"# {path}\n{named_lines(_graph(model, path))}"


def layer_diff(model: RoutedForCausalLM, layer: int) -> str:
    """Return how a layer's graph differs from that of the base, captured anew; empty for a plain model.

    Raises:
        InputError: The model has no such layer.
    """
    path = _block(model, layer)
    if model.spec is None:
        return ""
    base: BaseModel = model.facts["base"]
    original = build_plain(base, str(model.dtype).removeprefix("torch."))
    return unified_diff(named_lines(_graph(original, path)), named_lines(_graph(model, path)))


def why(model: RoutedForCausalLM, name: str) -> str:
    """Say in one sentence what the matcher made of a submodule.

    Args:
        model: Plain or rewritten.
        name: Path of the submodule, or the end of one, such as `3.mlp`.

    Raises:
        InputError: The matcher saw no submodule of that name.
    """
    known = [unit.name for unit in model.match.units] + [refusal.name for refusal in model.match.refusals]
    if not any(path == name or path.endswith(f".{name}") for path in known):
        shown = ", ".join(known[:2]) + (f" to {known[-1]}" if len(known) > 2 else "")
        raise InputError(
            f"{name}: the matcher saw no submodule of that name; there are {len(known)}: {shown or 'none'}"
        )
    return model.match.why(name)


def _unit_facts(
    model: RoutedForCausalLM, unit: Unit, count: UnitFlops, measured: dict[str, Any], keep: dict[str, float] | None
) -> dict[str, Any]:
    rank = router_hidden = None
    sizes = {"unit": _size(model.graph.get_submodule(unit.name))}
    if model.spec is not None:
        sizes |= {role: _size(model.part(unit, role)) for role in INSERTED}
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
        "keep_ratio": measured.get("keep_ratio"),
        "recoverability": measured.get("recoverability"),
        "flops": {"dense": count.dense, "routed": None if keep is None else count.routed(keep[unit.name])},
        "parameters": sizes,
    }


def _keep(model: RoutedForCausalLM, measured: dict[str, Any]) -> dict[str, float] | None:
    """Return the share of executed tokens of every unit; None where the bundle holds no measurement."""
    if model.spec is None:
        return {unit.name: 1.0 for unit in model.units}
    shares = {unit.name: measured.get(unit.name, {}).get("keep_ratio") for unit in model.units}
    return None if None in shares.values() else shares


def _sparsity(
    model: RoutedForCausalLM, keep: dict[str, float] | None, config: dict[str, Any]
) -> dict[str, float | None] | None:
    if model.spec is None or keep is None:
        return None
    skipped: dict[str, list[float]] = {"realized": [], "attention": [], "ffn": []}
    for unit in model.units:
        skipped["realized"].append(1 - keep[unit.name])
        skipped[unit.kind].append(1 - keep[unit.name])
    means = {kind: sum(shares) / len(shares) if shares else 0.0 for kind, shares in skipped.items()}
    return {"target": config.get("sparsity", {}).get("target"), **means}


def _seq_len(model: RoutedForCausalLM, config: dict[str, Any]) -> int:
    """Tokens a window, as in `irc eval`: the conversion's, else the default cut to the model's context."""
    recorded = config.get("data", {}).get("seq_len")
    default = Recipe().seq_len
    return int(recorded or min(default, getattr(model.config, "max_position_embeddings", None) or default))


def _block(model: RoutedForCausalLM, layer: int) -> str:
    blocks = {unit.layer: unit.block for unit in model.units}
    if layer not in blocks:
        there = f"0 to {max(blocks)}" if blocks else "none"
        raise InputError(f"layer {layer}: the model has no such layer; there are {there}")
    return blocks[layer]


def _graph(model: RoutedForCausalLM, path: str) -> fx.Graph:
    graph = model.graph.get_submodule(path).graph
    assert isinstance(graph, fx.Graph)
    return graph


def _size(module: nn.Module) -> int:
    """Parameters of a module, tied ones once, LoRA left out."""
    return sum(parameter.numel() for name, parameter in module.named_parameters() if "lora_" not in name)


__all__ = ["INSERTED", "inspection", "layer_diff", "layer_graph", "parameters", "why"]
