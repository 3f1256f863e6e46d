"""LowerUnits keeps the numbers and routes of the mux model, and emits the operator of each inserted module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import Olmo2Config

from irc.model.modules import BottleneckRouter, Forecaster, Mux, Router, RoutingControl, StoredKeys, ZeroForecaster
from irc.model.policies import StaticRouter
from passes.base import PassError, PassManager, finish, graph_of
from passes.insert_forecasters import InsertForecasters
from passes.insert_routers import InsertRouters
from passes.lower_units import LowerUnits
from passes.mask_skipped_keys import MaskSkippedKeys
from passes.match import match_units
from passes.printer import print_graph, print_model
from passes.raise_attention import RaiseAttention
from passes.raise_norms import RaiseNorms

aten, irc = torch.ops.aten, torch.ops.irc
BEFORE = (RaiseNorms(), RaiseAttention())
FAMILIES = ["llama", "llama-mha-biased-rope3", "mistral-sliding", "qwen2", "qwen3"]
UNITS = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn", "mlp")]


def _bias(graph: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for name, parameter in graph.named_parameters():
            if name.endswith("_router.2.bias"):
                parameter[0] += amount


def _nodes(model: nn.Module, target: object) -> list[fx.Node]:
    graphs = [graph for module in model.modules() if (graph := graph_of(module)) is not None]
    return [node for graph in graphs for node in graph.nodes if node.target == target]


def _count(model: nn.Module, *names: str) -> dict[str, int]:
    return {name: len(_nodes(model, getattr(irc, name).default)) for name in names}


def _inserted(control: RoutingControl, graph: fx.GraphModule, forecaster: Callable, router: Callable) -> None:
    """Insert modules of other kinds than the fixture does."""
    forecasters = InsertForecasters(lambda unit: forecaster(unit.width), lambda unit: Mux(unit.name, control))
    routers = InsertRouters(lambda unit: router(graph.get_submodule(f"{unit.name}_forecaster"), unit.width), "stream")
    PassManager([forecasters, routers]).run(graph)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gates", ["mixed", "all executed", "all skipped"])
@torch.no_grad()
def test_numbers_are_those_of_the_mux_model(tiny: Callable, insertions: tuple, family: str, gates: str) -> None:
    """fp32, 1e-5 absolute: matrix products over fewer rows, and merged biases, may round differently."""
    model = tiny(family)
    ids = model.ids(3, 9)
    PassManager([*insertions, *BEFORE]).run(model.graph)
    _bias(model.graph, {"mixed": 0.0, "all executed": 1e3, "all skipped": -1e3}[gates])
    before = model.run(ids)
    assert PassManager([LowerUnits()]).run(model.graph).modified
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not any(isinstance(module, Mux) for module in model.graph.modules())


@torch.no_grad()
def test_routes_are_those_of_the_mux_model_under_the_units_names(
    tiny: Callable, insertions: tuple, control: RoutingControl
) -> None:
    model = tiny()
    ids = model.ids(3, 9)
    PassManager([*insertions, *BEFORE]).run(model.graph)
    with control.using(tape={}):
        model.run(ids)
        masks = {name: record.execute for name, record in control.tape.items()}
    assert any(0 < mask.float().mean() < 1 for mask in masks.values())
    PassManager([LowerUnits()]).run(model.graph)
    decisions = _nodes(model.graph, irc.decide_rows.default)
    assert [node.kwargs["unit"] for node in decisions] == UNITS
    for node in decisions:
        block = model.graph.get_submodule(str(node.kwargs["unit"]).rpartition(".")[0])
        difference = _value_of(block, node.args[0], lambda: model.run(ids))
        assert torch.equal(~(difference < 0), masks[node.kwargs["unit"]])


def _value_of(block: nn.Module, wanted: fx.Node, run: Callable[[], object]) -> torch.Tensor:
    """Return what a node of a block's graph computes while a model runs."""
    seen: list[torch.Tensor] = []
    output = next(node for node in block.graph.nodes if node.op == "output")
    results = output.args[0]
    output.args = (type(results)((*results, wanted)),)
    finish(block)
    hook = block.register_forward_hook(lambda module, args, out: (seen.append(out[-1]), out[:-1])[1])
    run()
    hook.remove()
    output.args = (results,)
    finish(block)
    return seen[0]


@torch.no_grad()
def test_equal_logits_execute(tiny: Callable, insertions: tuple) -> None:
    model = tiny()
    ids = model.ids(1, 5)
    before = model.run(ids)
    PassManager(insertions).run(model.graph)
    for name, parameter in model.graph.named_parameters():
        if "_router.2." in name:
            parameter.zero_()
    PassManager([*BEFORE, LowerUnits()]).run(model.graph)
    torch.testing.assert_close(model.run(ids)[0], before[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_logits_that_are_nan_execute(tiny: Callable, insertions: tuple) -> None:
    model = tiny()
    ids = model.ids(1, 5)
    before = model.run(ids)
    PassManager(insertions).run(model.graph)
    for name, parameter in model.graph.named_parameters():
        if name.endswith("_router.2.bias"):
            parameter.fill_(torch.nan)
    PassManager([*BEFORE, LowerUnits()]).run(model.graph)
    torch.testing.assert_close(model.run(ids)[0], before[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_mux_without_router_passes_the_unit_on(tiny: Callable, insertions: tuple, calls: Callable) -> None:
    model = tiny()
    ids = model.ids(1, 5)
    before = model.run(ids)
    PassManager([insertions[0], *BEFORE, LowerUnits()]).run(model.graph)
    assert calls(model.graph)["forecaster"] == calls(model.graph)["mux"] == 0
    torch.testing.assert_close(model.run(ids)[0], before[0], rtol=0, atol=1e-5)


# What each kind of inserted module becomes, in two layers of two units.
LINEAR = {"forecast_add": 4, "scatter_add": 4, "compact": 8}
CALLED = {"forecast_add": 0, "scatter_add": 8, "compact": 12}
NOTHING = {"forecast_add": 0, "scatter_add": 4, "compact": 8}
KINDS: dict[str, tuple[Callable, Callable, dict[str, int]]] = {
    "linear": (lambda width: Forecaster(width, 4), lambda _, width: Router(width, 8), LINEAR | {"router": 4}),
    "silu": (lambda width: Forecaster(width, 4, "silu"), lambda _, width: Router(width, 8), CALLED | {"router": 4}),
    "bottleneck": (
        lambda width: Forecaster(width, 4),
        lambda beside, _: BottleneckRouter(beside, 8),
        LINEAR | {"router": 4},
    ),
    "silu bottleneck": (
        lambda width: Forecaster(width, 4, "silu"),
        lambda beside, _: BottleneckRouter(beside, 8),
        CALLED | {"router": 4},
    ),
    "zeros": (lambda width: ZeroForecaster(), lambda _, width: Router(width, 8), NOTHING | {"router": 4}),
    "static": (lambda width: ZeroForecaster(), lambda *_: StaticRouter(), NOTHING | {"router": 0}),
    "of no form": (
        lambda width: nn.Sequential(nn.Linear(width, width), nn.Tanh()),
        lambda _, width: nn.Linear(width, 2),
        CALLED | {"router": 0},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_inserted_module_keeps_its_numbers(tiny: Callable, control: RoutingControl, kind: str) -> None:
    """fp32, 1e-4 absolute on logits of about 10: inserted weights have a standard deviation of 0.3."""
    model = tiny()
    forecaster, router, expected = KINDS[kind]
    _inserted(control, model.graph, forecaster, router)
    for name, parameter in model.graph.named_parameters():
        if "_forecaster" in name or "_router" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    ids = model.ids(3, 9)
    with control.using(tape={}):
        before = model.run(ids)
        shares = [record.execute.float().mean().item() for record in control.tape.values()]
    assert min(shares) < 1
    assert max(shares) > 0
    PassManager([*BEFORE, LowerUnits()]).run(model.graph)
    assert _count(model.graph, *expected) == expected
    assert _count(model.graph, "decide_rows", "scatter", "select_rows") == {
        "decide_rows": 4,
        "scatter": 0,
        "select_rows": 0,
    }
    for got, wanted in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_bottleneck_router_keeps_the_bias_that_the_forecast_has_merged(
    tiny: Callable, control: RoutingControl
) -> None:
    graph = tiny().graph
    forecaster, router, _ = KINDS["bottleneck"]
    _inserted(control, graph, forecaster, router)
    down = graph.get_submodule("model.layers.0.mlp_forecaster.down")
    weight, bias = down.weight, down.bias.clone()
    PassManager([*BEFORE, LowerUnits()]).run(graph)
    down = graph.get_submodule("model.layers.0.mlp_forecaster.down")
    assert down.weight is weight, "one copy of the weight serves router and forecast"
    assert torch.equal(down.bias, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_merged_weights_are_computed_in_float32_and_keep_the_dtype(
    tiny: Callable, control: RoutingControl, dtype: torch.dtype
) -> None:
    model = tiny("llama", dtype)
    _inserted(
        control, model.graph, lambda width: Forecaster(width, 4).to(dtype), lambda _, width: Router(width, 8).to(dtype)
    )
    last = model.graph.get_submodule("model.layers.0.mlp_router.2")
    forecaster = model.graph.get_submodule("model.layers.0.mlp_forecaster")
    weight, bias = last.weight.float(), last.bias.float()
    up, down = forecaster.up, forecaster.down
    at_zero = up.weight.float() @ down.bias.float() + up.bias.float()
    PassManager([*BEFORE, LowerUnits()]).run(model.graph)
    single = model.graph.get_submodule("model.layers.0.mlp_router.2")
    assert single.out_features == 1
    assert torch.equal(single.weight, (weight[:1] - weight[1:]).to(dtype))
    assert torch.equal(single.bias, (bias[:1] - bias[1:]).to(dtype))
    merged = model.graph.get_parameter("model.layers.0.mlp_forecaster.bias")
    assert torch.equal(merged, at_zero.to(dtype))
    assert not merged.requires_grad
    assert model.run(model.ids(3, 9))[0].isfinite().all()


@torch.no_grad()
def test_what_stands_between_a_unit_and_its_add_sees_the_rows_of_the_unit(tiny_of: Callable, insertions: tuple) -> None:
    """OLMo 2 has a norm there, behind attention and FFN."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = tiny_of(Olmo2Config(**shape, **heads, pad_token_id=None))
    ids = model.ids(3, 9)
    PassManager([*insertions, *BEFORE]).run(model.graph)
    before = model.run(ids)
    PassManager([LowerUnits()]).run(model.graph)
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    units, nodes = match_units(model.graph).units, model.graph.get_submodule("model.layers.0").graph.nodes
    whole = [node for node in nodes if node.name in [unit.add for unit in units]]
    assert [node.args[0].target for node in whole] == [irc.rms_norm.default] * 2


def _multiplied(add: fx.Node, choice: fx.Node) -> None:
    add.target = aten.mul.Tensor


def _doubled(add: fx.Node, choice: fx.Node) -> None:
    add.kwargs = {"alpha": 2}


def _added_to_a_number(add: fx.Node, choice: fx.Node) -> None:
    add.args = (choice, 0.5)


def _added_to_itself(add: fx.Node, choice: fx.Node) -> None:
    add.args = (choice, choice)


def _read_again(add: fx.Node, choice: fx.Node) -> None:
    with add.graph.inserting_after(add):
        more = add.graph.call_function(aten.mul.Tensor, (add, choice))
    add.replace_all_uses_with(more, lambda user: user is not more)


@pytest.mark.parametrize("change", [_multiplied, _doubled, _added_to_a_number, _added_to_itself, _read_again])
@pytest.mark.parametrize("kind", ["linear", "zeros"])
@torch.no_grad()
def test_a_choice_that_is_not_simply_added_is_made_whole(
    tiny: Callable, control: RoutingControl, change: Callable, kind: str
) -> None:
    model = tiny()
    ids = model.ids(3, 9)
    _inserted(control, model.graph, *KINDS[kind][:2])
    PassManager(BEFORE).run(model.graph)
    for unit in match_units(model.graph).units:
        block = model.graph.get_submodule(unit.block)
        choice = next(node for node in block.graph.nodes if node.name == unit.add)
        (add,) = choice.users
        change(add, choice)
        finish(block)
    before = model.run(ids)
    assert LowerUnits().call(model.graph).modified
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert _count(model.graph, "scatter", "scatter_add", "forecast_add") == {
        "scatter": 8,  # two for each unit
        "scatter_add": 0,
        "forecast_add": 0,
    }


def _rows_seen(graph: nn.Module, ids: torch.Tensor, model: Any) -> dict[str, int]:
    seen: dict[str, int] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, args[0].flatten(0, -2).shape[0])
        )
        for name, module in graph.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model.run(ids)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_skipped_tokens_reach_no_linear_but_k_v_and_the_head(tiny: Callable, control: RoutingControl) -> None:
    model = tiny()
    _inserted(control, model.graph, *KINDS["silu"][:2])
    PassManager([*BEFORE, LowerUnits()]).run(model.graph)
    ids = model.ids(3, 9)
    _bias(model.graph, -1e3)
    rows = _rows_seen(model.graph, ids, model)
    assert sum("_forecaster" in name for name in rows) == 8
    for name, count in rows.items():
        gated = name.endswith(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
        assert count == (0 if gated else 27), name
    _bias(model.graph, 2e3)
    for name, count in _rows_seen(model.graph, ids, model).items():
        assert count == (0 if "_forecaster" in name else 27), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reduced_units_store_executed_tokens_only(
    tiny: Callable, insertions: tuple, control: RoutingControl, family: str
) -> None:
    """In three calls, logits are those of the masked model in one (fp32, 1e-5); caches hold executed tokens."""
    model = tiny(family)
    attention = [unit.name for unit in match_units(model.graph).units if unit.kind == "attention"]
    control.reduced = frozenset(attention[:1])
    masks = MaskSkippedKeys(control.reduced, lambda unit: StoredKeys(unit.name, control))
    PassManager([*insertions, masks]).run(model.graph)
    ids, tape = model.ids(3, 9), {}
    with control.using(tape=tape):
        model.run(ids)
        model.graph.get_parameter(f"{attention[0]}_router.2.bias")[0] -= tape[attention[0]].difference.median() + 1e-3
        expected = model.run(ids)[0]
    execute = tape[attention[0]].execute
    assert 0 < execute.float().mean() < 1
    PassManager([*BEFORE, LowerUnits()]).run(model.graph)
    past, slots, found = model.no_past(3), torch.zeros(3, 0, dtype=torch.int64), []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        positions, mask = torch.arange(start, end).expand(3, -1), torch.ones(3, end, dtype=torch.int64)
        logits, *past, slots = model.graph(ids[:, start:end], mask, positions, *past, slots)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-5)
    assert past[0].shape[2] == slots.shape[1]
    for row in range(3):
        assert slots[row][slots[row] >= 0].tolist() == execute[row].nonzero()[:, 0].tolist()


def test_golden_layer_and_attention(tiny: Callable, insertions: tuple, golden: Callable[[str], str]) -> None:
    graph = tiny().graph
    PassManager([*insertions, *BEFORE, LowerUnits()]).run(graph)
    layer, attention = "model.layers.1", "model.layers.1.self_attn"
    assert print_graph(graph.get_submodule(layer).graph) + "\n" == golden("lowered_layer")
    assert print_graph(graph.get_submodule(attention).graph) + "\n" == golden("lowered_attention")


def test_second_run_changes_nothing(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager([*insertions, *BEFORE, LowerUnits()]).run(graph)
    text = print_model(graph)
    assert not PassManager([*BEFORE, LowerUnits()]).run(graph).modified
    assert print_model(graph) == text


def test_of_a_plain_model_only_the_count_of_past_tokens_is_changed(tiny: Callable) -> None:
    graph = tiny().graph
    PassManager(BEFORE).run(graph)
    inner = {name: print_model(graph.get_submodule(name)) for name in ("model.layers.0", "model.norm")}
    assert PassManager([LowerUnits()]).run(graph).modified
    assert {name: print_model(graph.get_submodule(name)) for name in inner} == inner
    sizes = [
        (str(node.args[0]), node.args[1]) for node in graph.graph.nodes if node.target == torch.ops.aten.sym_size.int
    ]
    assert ("attention_mask", 1) in sizes
    assert not [name for name, dimension in sizes if name.startswith("past_key_values") and dimension == 2]
    assert not PassManager([LowerUnits()]).run(graph).modified


def test_attention_has_to_be_raised_first(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager(insertions).run(graph)
    with pytest.raises(PassError, match=r"model\.layers\.0\.self_attn: .*RaiseAttention"):
        PassManager([LowerUnits()]).run(graph)


def test_queries_that_mix_tokens_are_refused_by_name(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager([*insertions, *BEFORE]).run(graph)
    inner = graph.get_submodule("model.layers.0.self_attn").graph
    linear = next(node for node in inner.nodes if node.target == "q_proj")
    with inner.inserting_after(linear):
        mixed = inner.call_function(aten.flip.default, (linear, [1]), name="mixed")
    linear.replace_all_uses_with(mixed, lambda user: user is not mixed)
    with pytest.raises(PassError) as caught:
        LowerUnits().call(graph)
    assert caught.value.where == "model.layers.0.self_attn, node %mixed"
    assert "aten.flip.default" in caught.value.expected
