from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from irc.model.modules import Router, RoutingControl
from passes.base import PassError, PassManager
from passes.insert_routers import InsertRouters
from passes.printer import print_graph, print_model


def test_golden_layer(tiny: Callable, insertions: tuple, golden: Callable[[str], str]) -> None:
    graph = tiny().graph
    assert PassManager(insertions).run(graph).modified
    for layer in range(2):
        text = print_graph(graph.get_submodule(f"model.layers.{layer}").graph)
        assert text + "\n" == golden("layer_with_routers")


def test_adds_a_router_a_unit_and_no_other_call(tiny: Callable, insertions: tuple, calls: Callable) -> None:
    graph = tiny("llama-3-layers").graph
    PassManager(insertions[:1]).run(graph)
    before = calls(graph)
    PassManager(insertions[1:]).run(graph)
    assert calls(graph) - before == Counter(router=6)
    assert before - calls(graph) == Counter()


def test_second_run_changes_nothing(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager(insertions).run(graph)
    text, parameters = print_model(graph), dict(graph.named_parameters())
    assert not PassManager(insertions).run(graph).modified
    assert print_model(graph) == text
    assert all(parameter is parameters[name] for name, parameter in graph.named_parameters())


def test_forecasters_come_first(tiny: Callable, insertions: tuple) -> None:
    with pytest.raises(PassError) as caught:
        PassManager(insertions[1:]).run(tiny().graph)
    assert caught.value.where == "model.layers.0.self_attn"
    assert "InsertForecasters" in caught.value.remedy


@pytest.mark.parametrize("family", ["llama", "llama-mha-biased-rope3", "mistral-sliding", "qwen2", "qwen3"])
def test_all_units_executed_is_the_original_bit_for_bit(
    tiny: Callable, insertions: tuple, control: RoutingControl, family: str
) -> None:
    model = tiny(family)
    ids = model.ids(2, 7)
    before = model.run(ids)
    PassManager(insertions).run(model.graph)
    control.mode = "execute"
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _gradients(weights: dict[str, torch.Tensor], logits: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(weights, torch.autograd.grad(_loss(logits, ids), list(weights.values())), strict=True))


def _compare(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        assert reference.abs().max() > 0, name
        torch.testing.assert_close(
            got[name], reference, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("family", ["llama", "llama-mha-biased-rope3", "qwen3"])
def test_gradients_of_all_original_weights_are_kept(
    tiny: Callable, insertions: tuple, control: RoutingControl, family: str
) -> None:
    """Insertion does not change a single bit of a gradient.

    Against eager they are exact too where every query head has its own key and value head; with grouped
    heads eager adds up the group's gradients in another order, so fp32 rounding (1e-6 absolute) is allowed.
    """
    model = tiny(family)
    ids = model.ids(2, 7)
    logits = model.eager(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    eager = _gradients(dict(model.eager.named_parameters()), logits, ids)

    weights = dict(model.graph.named_parameters())
    for parameter in weights.values():
        parameter.requires_grad_(True)
    captured = _gradients(weights, model.run(ids)[0], ids)
    grouped = model.config.num_key_value_heads < model.config.num_attention_heads
    _compare(captured, eager, atol=1e-6 if grouped else 0.0)

    PassManager(insertions).run(model.graph)
    control.mode = "execute"
    _compare(_gradients(weights, model.run(ids)[0], ids), captured, atol=0.0)


def _replace_in_eager(model: Any, unit: str, forecaster: torch.nn.Module, execute: torch.Tensor) -> None:
    """Make the eager model's unit return its forecast where the mask says so; the unit still runs."""

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        y = output[0] if isinstance(output, tuple) else output
        chosen = torch.where(execute.unsqueeze(-1), y, forecaster(x))
        return (chosen, *output[1:]) if isinstance(output, tuple) else chosen

    model.eager.get_submodule(unit).register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("tokens", ["all", "some"])
@pytest.mark.parametrize("kind", ["self_attn", "mlp"])
@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_one_closed_gate_gives_the_forecast_in_the_unit_s_place(
    tiny: Callable, insertions: tuple, control: RoutingControl, layer: int, kind: str, tokens: str
) -> None:
    """Equals eager with a hook, exact in fp32; keys and values of the layer itself are untouched."""
    model = tiny()
    ids = model.ids(2, 7)
    before = model.run(ids)
    PassManager(insertions).run(model.graph)
    unit = f"model.layers.{layer}.{kind}"
    mask = torch.zeros(2, 7, dtype=torch.bool) if tokens == "all" else torch.rand(2, 7) < 0.5
    open_everywhere = torch.ones(2, 7, dtype=torch.bool)
    control.mode = "forced"
    control.masks = {f"model.layers.{i}.{k}": open_everywhere for i in range(2) for k in ("self_attn", "mlp")}
    control.masks[unit] = mask
    logits, *present = model.run(ids)

    forecaster = model.graph.get_submodule(f"{unit}_forecaster")
    _replace_in_eager(model, unit, forecaster, mask)
    expected = model.eager(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=0)
    for index, (got, original) in enumerate(zip(present, before[1:], strict=True)):
        if index // 2 <= layer:
            torch.testing.assert_close(got, original, rtol=0, atol=0)
        else:
            assert not torch.equal(got, original)
    assert (logits - before[0]).abs().max() > 1e-3


@torch.no_grad()
def test_routers_decide_in_mode_route(tiny: Callable, insertions: tuple, control: RoutingControl) -> None:
    """Shifting every router far to one side gives the all-executed or the all-approximated model, exactly."""
    model = tiny()
    ids = model.ids(2, 7)
    PassManager(insertions).run(model.graph)
    expected = {}
    for mode in ("execute", "approximate"):
        with control.using(mode=mode):
            expected[mode] = model.run(ids)[0]
    assert not torch.equal(expected["execute"], expected["approximate"])
    routers = [module for module in model.graph.modules() if isinstance(module, Router)]
    assert len(routers) == 4
    for amount, mode in ((1e4, "execute"), (-2e4, "approximate")):
        for router in routers:
            router.shift(amount)
        torch.testing.assert_close(model.run(ids)[0], expected[mode], rtol=0, atol=0)


def test_router_and_forecaster_read_what_the_unit_reads(tiny: Callable, insertions: tuple) -> None:
    model = tiny()
    seen: dict[str, torch.Tensor] = {}
    PassManager(insertions).run(model.graph)
    for name in ("mlp_router", "mlp_forecaster", "mlp.gate_proj"):
        module = model.graph.get_submodule(f"model.layers.1.{name}")
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    model.run(model.ids(1, 5))
    torch.testing.assert_close(seen["mlp_router"], seen["mlp.gate_proj"], rtol=0, atol=0)
    torch.testing.assert_close(seen["mlp_forecaster"], seen["mlp.gate_proj"], rtol=0, atol=0)


def test_the_pass_takes_its_modules_from_the_factory(tiny: Callable, insertions: tuple) -> None:
    widths: list[int] = []

    def make(unit: Any) -> Router:
        widths.append(unit.width)
        return Router(unit.width, 3)

    graph = tiny().graph
    PassManager([insertions[0], InsertRouters(make)]).run(graph)
    assert widths == [32] * 4


@pytest.mark.parametrize("reads", ["stream", "layer"])
def test_routers_can_read_the_residual_stream(
    tiny: Callable, insertions: tuple, control: RoutingControl, reads: str
) -> None:
    """`stream`: what the unit's output is added to; `layer`: the stream before the layer's first unit."""
    model = tiny()
    seen: dict[str, torch.Tensor] = {}
    PassManager([insertions[0], InsertRouters(lambda unit: Router(unit.width, 8), reads)]).run(model.graph)
    names = ("self_attn_router", "mlp_router", "input_layernorm", "post_attention_layernorm")
    for name in names:
        module = model.graph.get_submodule(f"model.layers.1.{name}")
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    control.mode = "execute"
    model.run(model.ids(1, 5))
    assert not torch.equal(seen["input_layernorm"], seen["post_attention_layernorm"])
    ffn_reads = "input_layernorm" if reads == "layer" else "post_attention_layernorm"
    assert torch.equal(seen["self_attn_router"], seen["input_layernorm"])
    assert torch.equal(seen["mlp_router"], seen[ffn_reads])


def test_a_second_run_changes_nothing_whatever_routers_read(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    passes = [insertions[0], InsertRouters(lambda unit: Router(unit.width, 8), "layer")]
    PassManager(passes).run(graph)
    text = print_model(graph)
    assert not PassManager(passes).run(graph).modified
    assert print_model(graph) == text


@pytest.mark.parametrize("reads", ["stream", "layer"])
def test_a_mux_outside_of_a_residual_add_is_refused(tiny: Callable, insertions: tuple, reads: str) -> None:
    graph = tiny().graph
    PassManager(insertions[:1]).run(graph)
    layer = graph.get_submodule("model.layers.0").graph
    mux = next(node for node in layer.nodes if node.target == "self_attn_mux")
    next(iter(mux.users)).target = torch.ops.aten.sub.Tensor
    with pytest.raises(PassError) as caught:
        InsertRouters(lambda unit: Router(unit.width, 8), reads).call(graph)  # type: ignore[arg-type]
    assert caught.value.where == "model.layers.0.self_attn"
    assert "%self_attn_mux" in caught.value.expected


def test_units_behind_one_that_has_a_router_get_theirs(tiny: Callable, insertions: tuple, calls: Callable) -> None:
    graph = tiny().graph
    PassManager(insertions[:1]).run(graph)
    graph.get_submodule("model.layers.0").add_module("self_attn_router", Router(32, 8))
    assert PassManager(insertions[1:]).run(graph).modified
    assert calls(graph)["router"] == 3
