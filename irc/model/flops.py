"""Matrix-multiply FLOPs per token, dense and routed, counted on the captured model.

A linear costs 2 * in * out per token. Attention scores and their weighted sum cost 4 * context * heads * head size per
executed token, where context is the mean number of keys that a token sees in a window.

Counted is what the lowered model computes. Every token pays for routers, K and V; executed tokens pay for Q, scores, O
and the FFN; approximated tokens pay for forecasters. In attention units that the key/value policy `reduced` applies to,
only executed tokens pay for K and V, and queries see executed keys alone. An expert of a mixture is counted for the
share of tokens that use it on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import fx, nn

from irc.model.experts import share_of_experts
from irc.model.modules import BottleneckRouter
from irc.model.routed import RoutedForCausalLM
from passes.match import Unit


@dataclass(frozen=True)
class UnitFlops:
    """FLOPs per token of one unit.

    Attributes:
        always: For every token, in the dense and in the routed model (K and V).
        gated: For executed tokens (Q and O, or the whole FFN).
        scores: For executed tokens: scores of all keys in the context, and their weighted sum.
        router: For every token of the routed model.
        forecaster: For approximated tokens.
        reduced: Whether skipped tokens have no keys.
    """

    always: float
    gated: float
    scores: float
    router: float
    forecaster: float
    reduced: bool

    @property
    def dense(self) -> float:
        """FLOPs per token of the original unit."""
        return self.always + self.gated + self.scores

    def routed(self, keep: float) -> float:
        """FLOPs per token when a share `keep` of the tokens executes."""
        always = self.always * (keep if self.reduced else 1.0)
        scores = self.scores * (keep if self.reduced else 1.0)
        return always + self.router + (self.gated + scores) * keep + self.forecaster * (1 - keep)


def unit_flops(model: RoutedForCausalLM, context: int) -> dict[str, UnitFlops]:
    """Count every unit of a model.

    Args:
        model: Plain or rewritten.
        context: Tokens per window; causal attention sees (context + 1) / 2 keys on average.
    """
    return {unit.name: _count(model, unit, (context + 1) / 2) for unit in model.units}


def head_flops(model: RoutedForCausalLM) -> float:
    """Return the FLOPs per token of the linears outside the units (the language-model head)."""
    inside = tuple(f"{unit.name}." for unit in model.units)
    total = 0.0
    for name, module in _linears(model.graph):
        if not name.startswith(inside) and not _is_inserted(model, name):
            total += 2.0 * module.in_features * module.out_features
    return total


@dataclass(frozen=True)
class FlopsRange:
    """The FLOPs ratios, routed over dense, that a rewritten model can have under the key/value policy `full`.

    Attributes:
        most: With every unit executed for every token; above 1 by what the routers cost.
        saved: How much it falls if a unit is skipped for every token, by unit.
    """

    most: float
    saved: dict[str, float]

    @property
    def removable(self) -> float:
        """How much it falls if everything is skipped."""
        return sum(self.saved.values())

    @property
    def least(self) -> float:
        """The ratio if everything is skipped: dense K and V, head, routers and forecasters."""
        return self.most - self.removable

    @property
    def weights(self) -> dict[str, float]:
        """The part of each unit in what can be removed; sums to 1."""
        return {name: saved / self.removable for name, saved in self.saved.items()}

    def share(self, ratio: float) -> float:
        """Return the share of what can be removed that a ratio asks for."""
        return (self.most - ratio) / self.removable

    def ratio(self, share: float) -> float:
        """Return the ratio when this share of what can be removed is removed."""
        return self.most - share * self.removable


def flops_range(model: RoutedForCausalLM, context: int) -> FlopsRange:
    """Return which FLOPs ratios a rewritten model can have.

    Args:
        model: Rewritten model.
        context: Tokens per window.
    """
    counts = unit_flops(model, context)
    dense = head_flops(model) + sum(count.dense for count in counts.values())
    return FlopsRange(
        1 + sum(count.router for count in counts.values()) / dense,
        {name: (count.gated + count.scores - count.forecaster) / dense for name, count in counts.items()},
    )


def flops_ratio(model: RoutedForCausalLM, keep: dict[str, float], context: int) -> float:
    """Return the ratio of routed to dense FLOPs; both include the head.

    Args:
        model: Rewritten model.
        keep: Share of executed tokens of every unit.
        context: Tokens per window.
    """
    counts = unit_flops(model, context)
    head = head_flops(model)
    dense = head + sum(count.dense for count in counts.values())
    routed = head + sum(count.routed(keep[name]) for name, count in counts.items())
    return routed / dense


def _count(model: RoutedForCausalLM, unit: Unit, keys: float) -> UnitFlops:
    submodule = model.graph.get_submodule(unit.name)
    always = gated = scores = 0.0
    free = _ungated(submodule) if unit.kind == "attention" else set()
    for name, linear in _linears(submodule):
        cost = 2.0 * linear.in_features * linear.out_features
        if name.startswith("experts."):
            cost *= share_of_experts(model.config)
        if name in free:
            always += cost
        else:
            gated += cost
    if unit.kind == "attention":
        config = model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        scores = 4.0 * keys * config.num_attention_heads * size
    added = {"router": 0.0, "forecaster": 0.0}
    if model.spec is not None:
        for role in added:
            added[role] = sum(2.0 * m.in_features * m.out_features for _, m in _linears(model.part(unit, role)))
        router = model.part(unit, "router")
        if isinstance(router, BottleneckRouter):  # it computes the bottleneck of every token itself
            added["router"] += 2.0 * router.bottleneck.in_features * router.bottleneck.out_features
    return UnitFlops(always, gated, scores, reduced=unit.name in model.control.reduced, **added)


def _ungated(submodule: nn.Module) -> set[str]:
    """Return the names of the linears that K and V depend on."""
    graph = cast(fx.Graph, submodule.graph)
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    results = list(cast(Any, output)) if isinstance(output, (list, tuple)) else [output]
    pending = [node for node in results if isinstance(node, fx.Node) and node.op != "call_module"]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return {str(node.target) for node in seen if node.op == "call_module"}


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return all linears with their names; a linear with LoRA adapters counts once, as if they were merged."""
    found = []
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and "lora_" not in name:
            found.append((name.removesuffix(".base_layer"), child))
    return found


def _is_inserted(model: RoutedForCausalLM, name: str) -> bool:
    return any(name.startswith((f"{unit.name}_router", f"{unit.name}_forecaster")) for unit in model.units)
