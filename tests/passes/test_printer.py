from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from passes.base import PassManager
from passes.printer import named_lines, print_graph, print_model, unified_diff


class Sample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x) * self.scale, torch.cat([x, y], dim=-1)


def _layer(model: fx.GraphModule) -> fx.Graph:
    graph = model.get_submodule("model.layers.0").graph
    assert isinstance(graph, fx.Graph)
    return graph


def test_text_of_every_kind_of_node() -> None:
    assert print_graph(fx.symbolic_trace(Sample()).graph).splitlines() == [
        "%0 = input",
        "%1 = input",
        "%2 = call linear(%0)",
        "%3 = weight scale",
        "%4 = mul(%2, %3)",
        "%5 = cat([%0, %1], dim=-1)",
        "return [%4, %5]",
    ]


def test_operators_print_without_aten_and_slices_end_in_words() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    part = graph.call_function(torch.ops.aten.slice.Tensor, (x, 1, 0, 9223372036854775807))
    made = graph.call_function(torch.ops.aten.zeros.default, ([2],), {"pin_memory": False, "device": "cpu"})
    graph.output((part, made))
    assert print_graph(graph).splitlines()[1:3] == [
        "%1 = slice.Tensor(%0, 1, 0, end)",
        "%2 = zeros.default([2], device=cpu)",
    ]


@pytest.mark.parametrize("inserted", [0, 1, 2], ids=["layer", "layer_with_forecasters", "layer_with_routers"])
def test_layer_before_and_after_insertion(
    tiny: Callable, insertions: tuple, golden: Callable[[str], str], inserted: int
) -> None:
    graph = tiny().graph
    PassManager(insertions[:inserted]).run(graph)
    name = ("layer", "layer_with_forecasters", "layer_with_routers")[inserted]
    assert print_graph(_layer(graph)) + "\n" == golden(name)


def test_ffn(tiny: Callable, golden: Callable[[str], str]) -> None:
    assert print_graph(tiny().graph.get_submodule("model.layers.1.mlp").graph) + "\n" == golden("mlp")


def test_text_does_not_depend_on_node_names(tiny: Callable) -> None:
    graph = _layer(tiny().graph)
    before, named_before = print_graph(graph), named_lines(graph)
    for index, node in enumerate(graph.nodes):
        node.name = f"renamed_{index}"
    assert print_graph(graph) == before
    assert named_lines(graph) != named_before


def test_model_text_has_one_part_a_graph(tiny: Callable) -> None:
    model = tiny().graph
    headings = [line for line in print_model(model).splitlines() if line.startswith("# ")]
    assert headings[:2] == ["# (root)", "# model"]
    assert "# model.layers.1.self_attn" in headings
    assert "# lm_head" not in headings  # a linear is a leaf
    assert len(headings) == sum(isinstance(getattr(m, "graph", None), fx.Graph) for m in model.modules())


def test_named_lines_make_a_diff_of_what_was_inserted(tiny: Callable, insertions: tuple) -> None:
    model = tiny().graph
    before = named_lines(_layer(model))
    PassManager(insertions).run(model)
    diff = unified_diff(before, named_lines(_layer(model)), context=0).splitlines()[2:]
    assert [line for line in diff if not line.startswith("@@")] == [
        "-%add_7 = add.Tensor(%getitem, %getitem_4)",
        "+%self_attn_forecaster = call self_attn_forecaster(%getitem_1)",
        "+%self_attn_router = call self_attn_router(%getitem_1)",
        "+%self_attn_mux = call self_attn_mux(%getitem_4, %self_attn_forecaster, %self_attn_router)",
        "+%add_7 = add.Tensor(%getitem, %self_attn_mux)",
        "-%add_9 = add.Tensor(%getitem_5, %mlp)",
        "+%mlp_forecaster = call mlp_forecaster(%getitem_6)",
        "+%mlp_router = call mlp_router(%getitem_6)",
        "+%mlp_mux = call mlp_mux(%mlp, %mlp_forecaster, %mlp_router)",
        "+%add_9 = add.Tensor(%getitem_5, %mlp_mux)",
    ]


def test_diff_of_equal_texts_is_empty() -> None:
    assert unified_diff("a\nb", "a\nb") == ""


def test_diff_shows_only_the_context_asked_for() -> None:
    before = "\n".join("abcdefgh")
    assert unified_diff(before, before.replace("d", "X"), context=1).splitlines() == [
        "--- before",
        "+++ after",
        "@@ -3,3 +3,3 @@",
        " c",
        "-d",
        "+X",
        " e",
    ]


def test_operators_of_other_namespaces_keep_them() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    rows = graph.call_function(torch.ops.irc.select_rows.default, (x,))
    first = graph.call_function(operator.getitem, (rows, 0))
    made = graph.call_function(torch.ops.aten.zeros.default, ([2],), {"layout": torch.strided, "dtype": None})
    graph.output((first, [made, (x, 1)]))
    assert print_graph(graph).splitlines()[1:] == [
        "%1 = irc::select_rows.default(%0)",
        "%2 = getitem(%1, 0)",
        "%3 = zeros.default([2], dtype=None)",
        "return [%2, [%3, [%0, 1]]]",
    ]


def test_parts_of_a_model_are_apart() -> None:
    inner = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    graph = fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    assert print_model(fx.GraphModule(nn.ModuleDict({"inner": inner}), graph)) == (
        "# (root)\n%0 = input\n%1 = call inner(%0)\nreturn %1\n\n# inner\n%0 = input\n%1 = call 0(%0)\nreturn %1\n"
    )


def test_a_diff_has_three_lines_of_context_unless_asked_otherwise() -> None:
    before = "\n".join("abcdefghi")
    assert unified_diff(before, before.replace("e", "X")).splitlines()[3:] == [
        " b",
        " c",
        " d",
        "-e",
        "+X",
        " f",
        " g",
        " h",
    ]
