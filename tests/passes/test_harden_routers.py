from __future__ import annotations

from collections.abc import Callable

import torch

from irc.model.modules import Mux, RoutingControl
from passes.base import PassManager
from passes.harden_routers import HardenRouters
from passes.printer import print_graph, print_model


@torch.no_grad()
def test_decides_as_the_mux_decides(tiny: Callable, insertions: tuple, control: RoutingControl) -> None:
    """Bit for bit, on a model whose untrained routers execute some tokens and approximate others."""
    model = tiny()
    ids = model.ids(3, 9)
    PassManager(insertions).run(model.graph)
    control.tape = {}
    before = model.run(ids)
    shares = [record.execute.float().mean().item() for record in control.tape.values()]
    assert any(0 < share < 1 for share in shares)
    assert PassManager([HardenRouters()]).run(model.graph).modified
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not any(isinstance(module, Mux) for module in model.graph.modules())


@torch.no_grad()
def test_equal_logits_execute(tiny: Callable, insertions: tuple) -> None:
    model = tiny()
    ids = model.ids(1, 5)
    before = model.run(ids)
    PassManager(insertions).run(model.graph)
    for name, parameter in model.graph.named_parameters():
        if "_router.2." in name:
            parameter.zero_()
    PassManager([HardenRouters()]).run(model.graph)
    torch.testing.assert_close(model.run(ids)[0], before[0], rtol=0, atol=0)


@torch.no_grad()
def test_a_mux_without_router_passes_the_unit_on(tiny: Callable, insertions: tuple, calls: Callable) -> None:
    model = tiny()
    ids = model.ids(1, 5)
    before = model.run(ids)
    PassManager(insertions[:1]).run(model.graph)
    PassManager([HardenRouters()]).run(model.graph)
    assert calls(model.graph)["forecaster"] == 0
    torch.testing.assert_close(model.run(ids)[0], before[0], rtol=0, atol=0)


def test_golden_layer(tiny: Callable, insertions: tuple, golden: Callable[[str], str]) -> None:
    graph = tiny().graph
    PassManager([*insertions, HardenRouters()]).run(graph)
    assert print_graph(graph.get_submodule("model.layers.1").graph) + "\n" == golden("layer_with_hard_routers")


def test_second_run_changes_nothing(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager([*insertions, HardenRouters()]).run(graph)
    text = print_model(graph)
    assert not PassManager([HardenRouters()]).run(graph).modified
    assert print_model(graph) == text
