"""FuseRouters, FuseDecisions and FuseForecasts: the same numbers, fewer nodes, nothing else touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from passes.base import Pass, PassManager, graph_of
from passes.fold_differences import FoldDifferences
from passes.fuse_decisions import FuseDecisions
from passes.fuse_forecasts import FuseForecasts
from passes.fuse_routers import FuseRouters
from passes.harden_routers import HardenRouters
from passes.lower_to_compaction import LowerToCompaction
from passes.printer import print_graph, print_model
from passes.raise_attention import RaiseAttention
from passes.raise_norms import RaiseNorms

irc = torch.ops.irc


def _lowering(*fusing: Pass) -> list[Pass]:
    return [RaiseNorms(), RaiseAttention(), HardenRouters(), FoldDifferences(), LowerToCompaction(), *fusing]


def _count(model: fx.GraphModule, target: object) -> int:
    return sum(node.target == target for module in model.modules() for node in getattr(graph_of(module), "nodes", ()))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_numbers_stay(tiny: Callable, insertions: tuple, family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    for name, module in model.graph.named_modules():
        if name.endswith(("_router", "_forecaster")):
            module.to(dtype)
    PassManager([*insertions, *_lowering()]).run(model.graph)
    for name, parameter in model.graph.named_parameters():
        if "_forecaster" in name or "_router" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.graph.to(dtype)
    ids = model.ids(3, 9)
    before = model.run(ids)
    assert PassManager([FuseRouters(), FuseDecisions(), FuseForecasts()]).run(model.graph).modified
    assert _count(model.graph, irc.router.default) == 4
    assert _count(model.graph, irc.decide_rows.default) == 4
    assert _count(model.graph, irc.select_rows.default) == 0
    assert _count(model.graph, irc.forecast_add.default) == 4
    after = model.run(ids)
    if dtype == torch.float32:
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_forecaster_with_an_activation_is_left_alone(tiny: Callable, insertions: tuple) -> None:
    model = tiny()
    PassManager([*insertions, *_lowering()]).run(model.graph)
    forecasters = [module for name, module in model.graph.named_modules() if name.endswith("_forecaster")]
    for forecaster in forecasters:
        forecaster.act = nn.SiLU()
    assert not PassManager([FuseForecasts()]).run(model.graph).modified
    assert _count(model.graph, irc.forecast_add.default) == 0


@torch.no_grad()
def test_a_forecast_or_a_logit_with_another_reader_is_left_alone(tiny: Callable, insertions: tuple) -> None:
    model = tiny()
    PassManager([*insertions, *_lowering()]).run(model.graph)
    for block in ("model.layers.0", "model.layers.1"):
        graph = model.graph.get_submodule(block).graph
        for call in [
            n for n in graph.nodes if n.op == "call_module" and str(n.target).endswith(("_forecaster", "_router"))
        ]:
            (reader,) = call.users
            with graph.inserting_after(reader):
                graph.call_function(torch.ops.aten.neg.default, (call,))
    text = print_model(model.graph)
    assert not PassManager([FuseRouters(), FuseForecasts()]).run(model.graph).modified
    assert print_model(model.graph) == text


@torch.no_grad()
def test_a_decision_is_the_same_to_the_bit(tiny: Callable, insertions: tuple) -> None:
    """Without FuseRouters, whose sums may round otherwise; one router's logits are no numbers."""
    model = tiny()
    PassManager([*insertions, *_lowering()]).run(model.graph)
    for name, parameter in model.graph.named_parameters():
        if "_router" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
        if name.endswith("0.mlp_router.2.bias"):
            parameter.data.fill_(torch.nan)
    ids = model.ids(3, 9)
    before = model.run(ids)
    assert PassManager([FuseDecisions()]).run(model.graph).modified
    assert all(torch.equal(one, other) for one, other in zip(before, model.run(ids), strict=True))


@pytest.mark.parametrize("target", [torch.ops.aten.logical_not.default, torch.ops.aten.lt.Scalar])
def test_a_decision_with_another_reader_is_left_alone(tiny: Callable, insertions: tuple, target: object) -> None:
    model = tiny()
    PassManager([*insertions, *_lowering()]).run(model.graph)
    graph = model.graph.get_submodule("model.layers.0").graph
    for node in [n for n in graph.nodes if n.target == target]:
        with graph.inserting_after(node):
            graph.call_function(torch.ops.aten.neg.default, (node,))
    assert PassManager([FuseDecisions()]).run(model.graph).modified
    assert _count(model.graph, irc.select_rows.default) == _count(model.graph, irc.decide_rows.default) == 2


def test_another_threshold_is_left_alone(tiny: Callable, insertions: tuple) -> None:
    model = tiny()
    PassManager([*insertions, *_lowering()]).run(model.graph)
    for layer in ("model.layers.0", "model.layers.1"):
        for node in model.graph.get_submodule(layer).graph.nodes:
            if node.target == torch.ops.aten.lt.Scalar:
                node.args = (node.args[0], 0.5)
    assert not PassManager([FuseDecisions()]).run(model.graph).modified


def test_golden_layer(tiny: Callable, insertions: tuple, golden: Callable[[str], str]) -> None:
    graph = tiny().graph
    PassManager([*insertions, *_lowering(FuseRouters(), FuseDecisions(), FuseForecasts())]).run(graph)
    assert print_graph(graph.get_submodule("model.layers.1").graph) + "\n" == golden("layer_fused")


@pytest.mark.parametrize("fusing", [FuseRouters, FuseDecisions, FuseForecasts])
def test_second_run_changes_nothing(tiny: Callable, insertions: tuple, fusing: type[Pass]) -> None:
    graph = tiny().graph
    PassManager([*insertions, *_lowering(fusing())]).run(graph)
    text = print_model(graph)
    assert not PassManager([fusing()]).run(graph).modified
    assert print_model(graph) == text
