from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from irc.model.modules import RoutingControl, StoredKeys
from passes.base import PassError, PassManager
from passes.mask_skipped_keys import MaskSkippedKeys
from passes.match import match_units
from passes.printer import print_graph, print_model

UNITS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.fixture
def reduce(insertions: tuple, control: RoutingControl) -> Callable[..., Any]:
    """Give `reduce(graph, units)`: insert everything, and reduce the units."""

    def run(graph: Any, units: list[str] = UNITS) -> Any:
        control.reduced = frozenset(units)
        masks = MaskSkippedKeys(units, lambda unit: StoredKeys(unit.name, control))
        return PassManager([*insertions, masks]).run(graph)

    return run


def force(control: RoutingControl, graph: Any, shape: tuple[int, int], seed: int = 5) -> None:
    """Make every unit follow a random mask; the first token of every sequence executes, so that no row is empty."""
    draw = torch.Generator().manual_seed(seed)
    control.mode = "forced"
    for unit in match_units(graph).units:
        control.masks[unit.name] = torch.rand(shape, generator=draw) < 0.5
        control.masks[unit.name][:, 0] = True


def test_golden_layer(tiny: Callable, reduce: Callable, golden: Callable[[str], str]) -> None:
    graph = tiny().graph
    assert reduce(graph).modified
    assert print_graph(graph.get_submodule("model.layers.1").graph) + "\n" == golden("layer_with_masked_keys")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_executed_tokens_attend_to_executed_ones_alone(
    tiny: Callable, reduce: Callable, control: RoutingControl, family: str
) -> None:
    """Each unit's output on executed rows is eager attention on those rows alone, at their own positions."""
    model = tiny(family)
    reduce(model.graph)
    force(control, model.graph, (1, 12))
    seen: dict[str, dict[str, torch.Tensor]] = {name: {} for name in UNITS}
    for name in UNITS:
        router, mux = (model.graph.get_submodule(f"{name}_{role}") for role in ("router", "mux"))
        router.register_forward_hook(lambda _, args, out, name=name: seen[name].update(x=args[0]))
        mux.register_forward_hook(lambda _, args, out, name=name: seen[name].update(y=args[0]))
    model.run(model.ids(1, 12))
    for layer, name in enumerate(UNITS):
        rows = control.masks[name][0].nonzero()[:, 0]
        x = seen[name]["x"][:, rows]
        angles = model.eager.model.rotary_emb(x, rows[None])
        expected = model.eager.model.layers[layer].self_attn(x, position_embeddings=angles, attention_mask=None)[0]
        torch.testing.assert_close(seen[name]["y"][:, rows], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
@torch.no_grad()
def test_what_the_cache_holds_is_what_a_longer_text_sees(
    tiny: Callable, reduce: Callable, control: RoutingControl, family: str
) -> None:
    """In two calls the logits are those of one; skipped tokens have zeros in the cache, and no others."""
    model = tiny(family)
    reduce(model.graph)
    ids = model.ids(2, 12)
    force(control, model.graph, (2, 12))
    whole, masks = model.run(ids)[0], dict(control.masks)
    control.masks = {name: mask[:, :7] for name, mask in masks.items()}
    _, *past = model.run(ids[:, :7])
    control.masks = {name: mask[:, 7:] for name, mask in masks.items()}
    logits, *present = model.run(ids[:, 7:], past)
    torch.testing.assert_close(logits, whole[:, 7:], rtol=0, atol=1e-5)
    for layer, name in enumerate(UNITS):
        keys = present[2 * layer]
        assert torch.equal((keys != 0).any(-1).all(1), masks[name])


@torch.no_grad()
def test_units_that_are_not_reduced_are_untouched(tiny: Callable, reduce: Callable, control: RoutingControl) -> None:
    model, other = tiny(), tiny()
    reduce(model.graph, UNITS[:1])
    reduce(other.graph, [])
    ids = model.ids(2, 9)
    for name, parameter in other.graph.named_parameters():
        parameter.copy_(model.graph.get_parameter(name))
    for mode in ("execute", "sample", "route"):
        control.mode, control.reduced = mode, frozenset(UNITS[:1]) if mode != "route" else frozenset()
        control.noise = {unit.name: torch.full((2, 9), 0.5) for unit in match_units(model.graph).units}
        assert torch.equal(model.run(ids)[0], other.run(ids)[0])


def test_second_run_changes_nothing(tiny: Callable, reduce: Callable) -> None:
    graph = tiny().graph
    reduce(graph)
    text = print_model(graph)
    assert not reduce(graph).modified
    assert print_model(graph) == text


def test_what_cannot_be_reduced_is_refused(tiny: Callable, insertions: tuple, control: RoutingControl) -> None:
    masks = MaskSkippedKeys(UNITS[:1], lambda unit: StoredKeys(unit.name, control))
    with pytest.raises(PassError, match=f"^{UNITS[0]}: .*InsertRouters"):
        PassManager([insertions[0], masks]).run(tiny().graph)
    masks = MaskSkippedKeys(["model.layers.0.mlp"], lambda unit: StoredKeys(unit.name, control))
    with pytest.raises(PassError, match=f"^model.layers.0.mlp: .*{UNITS[0]}, {UNITS[1]}"):
        PassManager([*insertions, masks]).run(tiny().graph)


SDPA = torch.ops.aten.scaled_dot_product_attention.default


def _without_mask(graph: fx.Graph, scores: fx.Node) -> None:
    scores.args = scores.args[:3]


def _mask_made_inside(graph: fx.Graph, scores: fx.Node) -> None:
    with graph.inserting_before(scores):
        scores.update_arg(3, graph.call_function(torch.ops.aten.clone.default, (scores.args[3],)))


def _one_present(graph: fx.Graph, scores: fx.Node) -> None:
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ([output.args[0][2], *output.args[0][1:]],)


def _past_made_inside(graph: fx.Graph, scores: fx.Node) -> None:
    joined = next(node for node in graph.nodes if node.target == torch.ops.aten.cat.default and node.args[1] == -2)
    with graph.inserting_before(joined):
        joined.args = ([graph.call_function(torch.ops.aten.clone.default, (joined.args[0][0],)), joined.args[0][1]], -2)


@pytest.mark.parametrize("change", [_without_mask, _mask_made_inside, _one_present, _past_made_inside])
def test_a_mask_or_a_cache_from_inside_is_refused(
    tiny: Callable, insertions: tuple, control: RoutingControl, change: Callable
) -> None:
    graph = tiny().graph
    PassManager(insertions).run(graph)
    inner = graph.get_submodule(UNITS[0]).graph
    change(inner, next(node for node in inner.nodes if node.target == SDPA))
    with pytest.raises(PassError) as caught:
        MaskSkippedKeys(UNITS[:1], lambda unit: StoredKeys(unit.name, control)).call(graph)
    assert caught.value.where == UNITS[0]


def test_what_could_be_reduced_is_named(tiny: Callable, insertions: tuple, control: RoutingControl) -> None:
    graph = tiny().graph
    PassManager(insertions).run(graph)
    with pytest.raises(PassError) as caught:
        MaskSkippedKeys(["nothing"], lambda unit: StoredKeys(unit.name, control)).requires(graph)
    assert caught.value.where == "nothing"
    assert f"{UNITS[0]}, {UNITS[1]}" in caught.value.remedy
