"""Lowers every routed unit to the `irc::` operators: the unit runs on executed tokens, its forecaster on the others.

The compiler inserted router, forecaster and mux, so this pass knows what they compute and emits the operators that
compute it. Nothing is spelled out in small nodes to be recognized again.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import fx, nn

from passes import dialect  # noqa: F401 - registers the operators
from passes.attend_from_rows import attend_from_rows, is_raised
from passes.base import Pass, PassError, PassResult, finish, graph_of, transposed_weight
from passes.inserted import APPROXIMATE, EXECUTE, ForecasterForm, RouterForm, ZeroForm, forecaster_form, router_form
from passes.mask_skipped_keys import KEPT, KEYS
from passes.match import ADDS, Unit, after_call, is_mux, match_units
from passes.name_modules import PART
from passes.nested_graphs import add_input, add_output

aten, irc = torch.ops.aten, torch.ops.irc


class LowerUnits(Pass):
    """Replaces `h + mux(unit(x), forecaster(x), router(x))` by a decision, the unit on rows, and adds onto h.

    In every model, plain ones too, the number of past tokens then comes from the mask and not from the caches' size.

    Run after RaiseNorms and RaiseAttention. A decision compares the router's two logits in float32: equal logits
    execute, and so do logits that are NaN, as in `irc.model.modules.Mux`. Its operator carries the unit's name. A mux
    without a router passes the unit's output on.

    Keys and values are computed for all tokens, except in units that MaskSkippedKeys reduced. Those get an input
    `past_slots_LAYER` and an output: the slots of their cache, as `irc::reduced_attention` has them.

    Args:
        folded: Whether weights of routers and forecasters are merged where that saves work, and keys of skipped tokens
            dropped from the cache. False leaves these modules as they are, so that they can be shared and trained.
    """

    def __init__(self, folded: bool = True) -> None:
        self.folded = folded

    def requires(self, model: fx.GraphModule) -> None:
        """Refuse attention units that were not raised."""
        for unit in match_units(model).units:
            graph = graph_of(model.get_submodule(unit.name))
            if unit.kind == "attention" and graph and not is_raised(graph):
                raise PassError(unit.name, "expected a raised attention unit", "run RaiseAttention first")

    def call(self, model: fx.GraphModule) -> PassResult:
        """Lower all units that have a mux; the mux modules are dropped."""
        modified = False
        for unit in match_units(model).units:
            site = _Site.of(model, unit)
            if site is None:
                continue
            if len(site.mux.args) == 3:
                _lower(model, site, self.folded)
            else:
                _pass_on(site)
            finish(site.block)
            modified = True
        return PassResult(model, _count_past_by_mask(model) or modified)


@dataclass
class _Site:
    """A unit with a mux, and the nodes of its block that lowering works on.

    Attributes:
        unit: The unit.
        block: The module whose graph calls it.
        graph: Of the block.
        call: Calls the unit.
        x: The unit's input.
        mux: Chooses between the unit's output and its forecast.
        after: Nodes between the unit's call and the mux's first argument, in order; often none.
    """

    unit: Unit
    block: nn.Module
    graph: fx.Graph
    call: fx.Node
    x: fx.Node
    mux: fx.Node
    after: list[fx.Node]

    @classmethod
    def of(cls, model: fx.GraphModule, unit: Unit) -> _Site | None:
        """Find a unit's nodes; None where it has no mux."""
        block = model.get_submodule(unit.block)
        graph = cast(fx.Graph, block.graph)
        nodes = {node.name: node for node in graph.nodes}
        if unit.x not in nodes:  # without a norm before it, a unit reads what lowering the unit before it replaced
            unit = next(found for found in match_units(model).units if found.name == unit.name)
        mux = nodes.get(unit.add)
        if mux is None or not is_mux(mux):
            return None
        return cls(unit, block, graph, nodes[unit.call], nodes[unit.x], mux, after_call(nodes, unit))

    def part(self, role: str) -> nn.Module:
        """Return the unit's `router` or `forecaster`."""
        return self.block.get_submodule(f"{self.unit.target}_{role}")

    def emit(self, target: object, *args: object, role: str = "", name: str | None = None) -> fx.Node:
        """Insert an operator that does a part of the unit's work: its own, or that of its `router` or `forecaster`."""
        node = self.graph.call_function(target, args, name=name)  # type: ignore[arg-type]
        node.meta[PART] = f"{self.unit.target}_{role}" if role else self.unit.target
        return node

    def drop(self, node: fx.Node) -> None:
        """Erase a node and the module that it calls."""
        self.graph.erase_node(node)
        if hasattr(self.block, str(node.target)):
            delattr(self.block, str(node.target))


def _pass_on(site: _Site) -> None:
    """Remove a mux that has no decision to follow."""
    y, forecast = cast("tuple[fx.Node, fx.Node]", site.mux.args)
    site.mux.replace_all_uses_with(y)
    site.drop(site.mux)
    site.graph.erase_node(forecast)


def _lower(model: fx.GraphModule, site: _Site, folded: bool) -> None:
    unit, graph, mux, call = site.unit, site.graph, site.mux, site.call
    y, forecast, logits = cast("tuple[fx.Node, fx.Node, fx.Node]", mux.args)
    is_reduced = folded and _unmask(site)
    add, stream = _residual_add(mux)
    with graph.inserting_before(mux):
        both = site.emit(irc.decide_rows.default, _emit_router(site, logits, folded))
        both.kwargs = {"unit": unit.name}
        executed = site.emit(operator.getitem, both, 0, name=f"{unit.target}_executed")
        skipped = site.emit(operator.getitem, both, 1, name=f"{unit.target}_skipped")
        if stream is None:  # every token of x is overwritten: x only provides the shape
            forecast_rows = _on_rows(site, forecast, skipped, "forecaster")
            part = site.emit(irc.scatter.default, forecast_rows, skipped, site.x, role="forecaster")
        else:
            part = _emit_forecast(site, forecast, skipped, stream, folded)
        y_rows = _ffn_on_rows(site, executed) if unit.kind == "ffn" else y
        if unit.kind == "attention":
            _attention_on_rows(model, site, executed, is_reduced)
        scatter = irc.scatter.default if stream is None else irc.scatter_add.default
        whole = site.emit(scatter, y_rows, executed, part, name=f"{unit.target}_scattered")
    replaced = mux if add is None else add
    whole.meta["val"] = replaced.meta.get("val")
    replaced.replace_all_uses_with(whole)
    if add is not None:
        graph.erase_node(add)
    site.drop(mux)
    stale = [forecast, logits, *(reversed(site.after) if unit.kind == "ffn" else ()), call, skipped]
    for node in stale:
        if not node.users:
            graph.erase_node(node)
    if is_reduced:
        finish(site.block)
        _connect_slots(model, unit)


def _emit_router(site: _Site, logits: fx.Node, folded: bool) -> fx.Node:
    """Insert the router; return the node of its logit differences, float32 [batch, tokens]."""
    router, path, name = site.part("router"), str(logits.target), f"{site.unit.target}_difference"
    form = router_form(router) if folded else None
    if form is None:
        exact = site.emit(aten.to.dtype, logits, torch.float32, role="router")
        execute, approximate = (
            site.emit(aten.select.int, exact, -1, index, role="router") for index in (EXECUTE, APPROXIMATE)
        )
        return site.emit(aten.sub.Tensor, execute, approximate, role="router", name=name)
    _merge_logits(router, form)
    x = cast(fx.Node, logits.args[0])
    if form.of_bottleneck:
        forecaster = forecaster_form(site.part("forecaster"))
        assert isinstance(forecaster, ForecasterForm)
        for layer in (forecaster.down, forecaster.activation):
            x = site.graph.create_node("call_module", f"{site.unit.target}_forecaster.{layer}", (x,))
    weights = []
    for linear in (form.first, form.last):
        weights += [
            transposed_weight(site.graph, f"{path}.{linear}"),
            site.graph.get_attr(f"{path}.{linear}.bias"),
        ]
    return site.emit(irc.router.default, x, *weights, role="router", name=name)


def _merge_logits(router: nn.Module, form: RouterForm) -> None:
    """Give a router's last linear the difference of its two outputs as its only one.

    The weights are subtracted in float32, so a difference near zero may round differently from that of two logits.
    """
    last = router.get_submodule(form.last)
    assert isinstance(last, nn.Linear)
    single = nn.Linear(last.in_features, 1, device=last.weight.device, dtype=last.weight.dtype)
    with torch.no_grad():
        for name, parameter in last.named_parameters():
            execute, approximate = parameter.float()
            merged = single.get_parameter(name)
            merged.copy_((execute - approximate).view_as(merged))
    router.add_module(form.last, single)


def _emit_forecast(site: _Site, forecast: fx.Node, skipped: fx.Node, base: fx.Node, folded: bool) -> fx.Node:
    """Insert the addition of the skipped tokens' forecasts to base; return the sum, for zeros base itself."""
    forecaster, path = site.part("forecaster"), str(forecast.target)
    form = forecaster_form(forecaster)
    if isinstance(form, ZeroForm):
        return base
    if form is None or not form.is_linear or not folded:
        rows = _on_rows(site, forecast, skipped, "forecaster")
        return site.emit(irc.scatter_add.default, rows, skipped, base, role="forecaster")
    _merge_biases(forecaster, form)
    down, up = (transposed_weight(site.graph, f"{path}.{linear}") for linear in (form.down, form.up))
    bias = site.graph.get_attr(f"{path}.bias")
    return site.emit(irc.forecast_add.default, site.x, skipped, base, down, up, bias, role="forecaster")


def _merge_biases(forecaster: nn.Module, form: ForecasterForm) -> None:
    """Give a linear forecaster a parameter `bias`: what it returns for zeros, computed in float32."""
    down, up = forecaster.get_submodule(form.down), forecaster.get_submodule(form.up)
    assert isinstance(down, nn.Linear)
    assert isinstance(up, nn.Linear)
    with torch.no_grad():
        merged = (up.weight.float() @ down.bias.float() + up.bias.float()).to(up.bias.dtype)
    forecaster.register_parameter("bias", nn.Parameter(merged, requires_grad=False))


def _on_rows(site: _Site, call: fx.Node, rows: fx.Node, role: str = "") -> fx.Node:
    """Call a submodule of the block again, on chosen rows of x alone."""
    compacted = site.emit(irc.compact.default, site.x, rows, role=role)
    args = tuple(compacted if argument is site.x else argument for argument in call.args)
    return site.graph.create_node("call_module", str(call.target), args)


def _ffn_on_rows(site: _Site, rows: fx.Node) -> fx.Node:
    """Call an FFN, and what comes after it, on the executed rows alone."""
    y_rows = _on_rows(site, site.call, rows)
    for node in site.after:
        y_rows = site.graph.node_copy(node, partial(_argument_on_rows, y_rows))
    return y_rows


def _argument_on_rows(rows: fx.Node, argument: fx.Node) -> fx.Node:
    return argument if argument.op == "get_attr" else rows


def _attention_on_rows(model: fx.GraphModule, site: _Site, rows: fx.Node, is_reduced: bool) -> None:
    """Let an attention unit attend from the executed rows alone.

    Keys and values do not wait for the decision, but one call makes them and the output: it moves behind the decision.
    """
    attend_from_rows(model.get_submodule(site.unit.name), site.unit.name, is_reduced)
    call = site.call
    moved = site.graph.node_copy(call, lambda node: node)
    moved.args = (*call.args, rows)
    call.replace_all_uses_with(moved)
    behind = {moved}
    for node in _between(call, site.mux):
        if behind.intersection(node.all_input_nodes):
            site.mux.prepend(node)
            behind.add(node)


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Return the nodes of a graph after one and before another, in order."""
    nodes = list(first.graph.nodes)
    return nodes[nodes.index(first) + 1 : nodes.index(last)]


def _residual_add(mux: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the add that alone reads a unit's mux, and the stream that it adds to; None where there is none."""
    users = list(mux.users)
    if len(users) != 1 or users[0].target not in ADDS or users[0].kwargs or len(users[0].all_input_nodes) != 2:
        return None, None
    return users[0], next(node for node in users[0].all_input_nodes if node is not mux)


def _unmask(site: _Site) -> bool:
    """Remove the modules of MaskSkippedKeys, whose work the operator does; return whether the unit had them."""
    target = site.unit.target
    calls = [node for node in site.graph.nodes if node.op == "call_module"]
    for kept in [node for node in calls if node.target == f"{target}{KEPT}"]:
        kept.replace_all_uses_with(cast(fx.Node, kept.args[0]))
        site.drop(kept)
    masking = [node for node in calls if node.target == f"{target}{KEYS}"]
    for keys in masking:
        mask = cast(fx.Node, keys.args[0])
        for result in list(keys.users):
            if result.users:
                result.replace_all_uses_with(mask)
            site.graph.erase_node(result)
        site.drop(keys)
    return bool(masking)


def _connect_slots(model: fx.GraphModule, unit: Unit) -> None:
    """Pass the slots of a reduced unit's cache in from outside, and out."""
    slots = add_input(model, unit.name, f"past_slots_{unit.layer}")
    graph = slots.graph
    attention = next(node for node in graph.nodes if node.target == irc.reduced_attention.default)
    attention.args = (*attention.args[:6], slots, *attention.args[6:])
    with graph.inserting_after(attention):
        present = graph.call_function(operator.getitem, (attention, 3))
    add_output(model, unit.name, present)


def _count_past_by_mask(model: fx.GraphModule) -> bool:
    """Read the number of past tokens from the mask: caches may hold fewer tokens, or have room for more.

    Returns whether a node was replaced.
    """
    graph = model.graph
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    lengths = [(name, 2) for name in inputs if name.startswith("past_key_values_")]
    found = [n for n in graph.nodes if n.target == aten.sym_size.int and (str(n.args[0]), n.args[1]) in lengths]
    for node in found:
        with graph.inserting_before(node):
            total, new = (
                graph.call_function(aten.sym_size.int, (inputs[name], 1)) for name in ("attention_mask", "input_ids")
            )
            node.replace_all_uses_with(graph.call_function(operator.sub, (total, new)))
        graph.erase_node(node)
    if found:
        finish(model)
    return bool(found)
