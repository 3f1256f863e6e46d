"""What passes leave on nodes: names by which decisions are found, and traced values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from exporters.onnx import lowering
from passes.base import PassManager, graph_of
from passes.lower_units import LowerUnits
from passes.raise_attention import RaiseAttention
from passes.raise_norms import RaiseNorms

irc = torch.ops.irc
STEPS = RaiseNorms(), RaiseAttention(), LowerUnits()


def _nodes(model: fx.GraphModule) -> list[fx.Node]:
    return [node for module in model.modules() for node in getattr(graph_of(module), "nodes", ())]


def test_decisions_and_rows_are_named_after_their_unit(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager([*insertions, *STEPS]).run(graph)
    names = {node.name for node in graph.get_submodule("model.layers.1").graph.nodes}
    kinds = "difference", "executed", "skipped", "scattered"
    assert {f"{unit}_{kind}" for unit in ("self_attn", "mlp") for kind in kinds} <= names
    inner = {node.name for node in graph.get_submodule("model.layers.1.self_attn").graph.nodes}
    assert {"executed", "routed_attention"} <= inner


def _is_result_of_attention(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and source.target == irc.attention.default


# The number of steps that run, the nodes that carry a value then, and their number in two layers.
VALUES = [
    (1, lambda node: node.target == irc.rms_norm.default, 5),
    (2, _is_result_of_attention, 6),
    (2, lambda node: node.target == irc.rotary.default, 4),
    (3, lambda node: node.name.endswith("_scattered"), 4),
]


@pytest.mark.parametrize(("steps", "wanted", "count"), VALUES, ids=["norms", "attention", "rotations", "scatters"])
def test_traced_values_go_over_to_what_takes_a_place(
    tiny: Callable, insertions: tuple, steps: int, wanted: Callable, count: int
) -> None:
    graph = tiny().graph
    PassManager([*insertions, *STEPS[:steps]]).run(graph)
    values = [node.meta.get("val") for node in _nodes(graph) if wanted(node)]
    assert len(values) == count
    assert all(isinstance(value, torch.Tensor) for value in values)


def test_products_keep_the_values_of_their_linears(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager([*insertions, *lowering("cuda")]).run(graph)
    found = {node.target: node.meta.get("val") for node in _nodes(graph) if node.target in (irc.routed_gate.default,)}
    assert found.keys() == {irc.routed_gate.default}
    assert all(value.shape[-1] == 48 for value in found.values())
    values = [node.meta["val"] for node in _nodes(graph) if node.target == irc.routed_matmul.default]
    assert [value.shape[-1] for value in values if value is not None] == [
        32
    ] * 4  # down and o; q is a new node without a value
