from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from irc.model.modules import Forecaster, Mux, RoutingControl
from passes.base import PassError, PassManager
from passes.insert_forecasters import InsertForecasters
from passes.match import match_units
from passes.printer import print_graph, print_model


@pytest.fixture
def insert(insertions: tuple) -> InsertForecasters:
    result: InsertForecasters = insertions[0]
    return result


def test_golden_layer(tiny: Callable, insert: InsertForecasters, golden: Callable[[str], str]) -> None:
    graph = tiny().graph
    for layer in range(2):
        assert print_graph(graph.get_submodule(f"model.layers.{layer}").graph) + "\n" == golden("layer")
    assert PassManager([insert]).run(graph).modified
    for layer in range(2):
        text = print_graph(graph.get_submodule(f"model.layers.{layer}").graph)
        assert text + "\n" == golden("layer_with_forecasters")


def test_adds_a_forecaster_and_a_mux_a_unit_and_no_other_call(
    tiny: Callable, insert: InsertForecasters, calls: Callable
) -> None:
    graph = tiny("llama-3-layers").graph
    before = calls(graph)
    PassManager([insert]).run(graph)
    assert calls(graph) - before == Counter(forecaster=6, mux=6)
    assert before - calls(graph) == Counter()


def test_only_layers_change(tiny: Callable, insert: InsertForecasters) -> None:
    graph = tiny().graph
    texts = {name: print_graph(m.graph) for name, m in graph.named_modules() if hasattr(m, "graph")}
    PassManager([insert]).run(graph)
    changed = {name for name, text in texts.items() if print_graph(graph.get_submodule(name).graph) != text}
    assert changed == {"model.layers.0", "model.layers.1"}


def test_second_run_changes_nothing(tiny: Callable, insert: InsertForecasters) -> None:
    graph = tiny().graph
    PassManager([insert]).run(graph)
    text, parameters = print_model(graph), dict(graph.named_parameters())
    assert not PassManager([insert]).run(graph).modified
    assert print_model(graph) == text
    assert dict(graph.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in graph.named_parameters())


def test_factories_are_asked_once_a_unit(tiny: Callable, control: RoutingControl) -> None:
    asked: list[str] = []

    def make(unit: object) -> nn.Module:
        asked.append(unit.name)  # type: ignore[attr-defined]
        return Forecaster(32, 2)

    graph = tiny().graph
    PassManager([InsertForecasters(make, lambda unit: Mux(unit.name, control))]).run(graph)
    assert asked == [unit.name for unit in match_units(graph).units]
    assert isinstance(graph.get_submodule("model.layers.1.mlp_forecaster"), Forecaster)


@pytest.mark.parametrize("mode", ["route", "execute"])
@pytest.mark.parametrize("family", ["llama", "llama-mha-biased-rope3", "qwen3"])
def test_without_routers_the_model_is_the_original(
    tiny: Callable, insert: InsertForecasters, control: RoutingControl, family: str, mode: str
) -> None:
    """Exact in fp32: no mux may change a value."""
    model = tiny(family)
    ids = model.ids(2, 7)
    before = model.run(ids)
    PassManager([insert]).run(model.graph)
    control.mode = mode  # type: ignore[assignment]
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_all_approximated_differs(tiny: Callable, insert: InsertForecasters, control: RoutingControl) -> None:
    """Makes sure that the tests of equality can fail: the forecasts change the result."""
    model = tiny()
    ids = model.ids(2, 7)
    before = model.run(ids)[0]
    PassManager([insert]).run(model.graph)
    control.mode = "approximate"
    assert (model.run(ids)[0] - before).abs().max() > 0.1


def test_model_without_units_is_refused_with_the_nearest_miss(captured_module: Callable, insert: object) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.ffn(x).cumsum(1))

    model = captured_module(nn.Sequential(Odd()), torch.randn(1, 3, 4))
    with pytest.raises(PassError) as caught:
        PassManager([insert]).run(model)  # type: ignore[list-item]
    assert caught.value.where == "model"
    assert "InsertForecasters" in caught.value.expected
    assert "0.ffn: none of its outputs is added to the residual stream" in caught.value.expected


def test_model_without_anything_to_miss_is_refused(captured_module: Callable, insert: InsertForecasters) -> None:
    model = captured_module(nn.Sequential(nn.ReLU()), torch.randn(1, 3, 4))
    with pytest.raises(PassError) as caught:
        insert.requires(model)
    assert caught.value.where == "model"
    assert "(" not in caught.value.expected, "no near miss to name"


def test_what_is_inserted_is_called_by_its_name(tiny: Callable, insert: InsertForecasters) -> None:
    graph = tiny().graph
    PassManager([insert]).run(graph)
    calls = [node for node in graph.get_submodule("model.layers.1").graph.nodes if node.op == "call_module"]
    named = [(node.name, node.target) for node in calls if node.target.endswith(("_forecaster", "_mux"))]
    assert named == [(f"{unit}_{part}",) * 2 for unit in ("self_attn", "mlp") for part in ("forecaster", "mux")]
