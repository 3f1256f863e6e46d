from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from passes.base import PassManager
from passes.fold_differences import FoldDifferences
from passes.harden_routers import HardenRouters
from passes.printer import print_graph, print_model


def _last_linears(graph: nn.Module) -> list[nn.Linear]:
    return [module for name, module in graph.named_modules() if name.endswith("_router.2")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_difference_is_that_of_the_logits(tiny: Callable, insertions: tuple, dtype: torch.dtype) -> None:
    """Differences within rounding of the dtype (1e-5 for fp32), and the model's outputs where no route changes."""
    model = tiny("llama", dtype)
    for router in [module for module in model.graph.modules() if isinstance(module, nn.Sequential)]:
        router.to(dtype)
    PassManager([*insertions, HardenRouters()]).run(model.graph)
    model.graph.to(dtype)
    ids = model.ids(3, 9)
    before = model.run(ids)
    assert {linear.out_features for linear in _last_linears(model.graph)} == {2}
    assert PassManager([FoldDifferences()]).run(model.graph).modified
    assert {linear.out_features for linear in _last_linears(model.graph)} == {1}
    if dtype == torch.float32:
        torch.testing.assert_close(model.run(ids)[0], before[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_logit_with_another_reader_is_left_alone(tiny: Callable, insertions: tuple) -> None:
    model = tiny()
    PassManager([*insertions, HardenRouters()]).run(model.graph)
    for block in ("model.layers.0", "model.layers.1"):
        graph = model.graph.get_submodule(block).graph
        for node in [node for node in graph.nodes if node.target == torch.ops.aten.sub.Tensor]:
            with graph.inserting_after(node):
                extra = graph.call_function(torch.ops.aten.add.Tensor, (node, node.args[0]))
            node.replace_all_uses_with(extra, delete_user_cb=lambda user, extra=extra: user is not extra)
    text = print_model(model.graph)
    assert not PassManager([FoldDifferences()]).run(model.graph).modified
    assert print_model(model.graph) == text


def test_golden_layer(tiny: Callable, insertions: tuple, golden: Callable[[str], str]) -> None:
    graph = tiny().graph
    PassManager([*insertions, HardenRouters(), FoldDifferences()]).run(graph)
    assert print_graph(graph.get_submodule("model.layers.1").graph) + "\n" == golden("layer_with_folded_differences")


def test_second_run_changes_nothing(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager([*insertions, HardenRouters(), FoldDifferences()]).run(graph)
    text = print_model(graph)
    assert not PassManager([FoldDifferences()]).run(graph).modified
    assert print_model(graph) == text
