from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import fx, nn

from passes.base import PassManager
from passes.match import MatchResult, Refusal, Unit, _has_linear, is_mux, match_units

FAMILIES = {
    "llama": 2,
    "llama-mha-biased-rope3": 1,
    "llama-3-layers": 3,
    "mistral": 2,
    "mistral-sliding": 2,
    "qwen2": 2,
    "qwen3": 2,
}


@pytest.mark.parametrize(("family", "layers"), FAMILIES.items(), ids=list(FAMILIES))
def test_every_sublayer_of_a_family_is_a_unit(tiny: Callable, family: str, layers: int) -> None:
    found = match_units(tiny(family).graph)
    assert [(unit.name, unit.kind, unit.layer) for unit in found.units] == [
        (f"model.layers.{layer}.{name}", kind, layer)
        for layer in range(layers)
        for name, kind in (("self_attn", "attention"), ("mlp", "ffn"))
    ]
    assert found.refusals == ()
    assert {unit.width for unit in found.units} == {32}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_unit_names_the_nodes_round_it(tiny: Callable, family: str) -> None:
    graph = tiny(family).graph
    for unit in match_units(graph).units:
        block = graph.get_submodule(unit.block)
        nodes = {node.name: node for node in block.graph.nodes}
        call, x, y, add = (nodes[name] for name in (unit.call, unit.x, unit.y, unit.add))
        assert (call.op, call.target) == ("call_module", unit.target)
        assert x in call.args
        assert x.args[0].target == {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}[unit.kind]
        assert y is call or y.args[0] is call
        assert y in add.args
        assert unit.name == f"{unit.block}.{unit.target}"


def test_matching_changes_nothing_and_repeats(tiny: Callable) -> None:
    graph = tiny().graph
    before = graph.get_submodule("model.layers.0").graph.python_code("self").src
    assert match_units(graph) == match_units(graph)
    assert graph.get_submodule("model.layers.0").graph.python_code("self").src == before


def test_units_of_a_rewritten_model_are_the_same_with_the_mux_for_the_add(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    before = match_units(graph)
    PassManager(insertions).run(graph)
    after = match_units(graph)
    assert after.refusals == ()
    assert [(u.name, u.kind, u.x, u.y, u.width) for u in after.units] == [
        (u.name, u.kind, u.x, u.y, u.width) for u in before.units
    ]
    assert [unit.add for unit in after.units] == ["self_attn_mux", "mlp_mux"] * 2


def test_names_of_submodules_do_not_matter(tiny: Callable) -> None:
    """Renames attention and FFN of a captured Llama, in the module tree and in the calls."""
    graph = tiny().graph
    for layer in range(2):
        block = graph.get_submodule(f"model.layers.{layer}")
        for old, new in (("self_attn", "blender"), ("mlp", "grinder")):
            child = getattr(block, old)
            delattr(block, old)
            block.add_module(new, child)
            for node in block.graph.nodes:
                if node.op == "call_module" and node.target == old:
                    node.target = new
    units = match_units(graph).units
    assert [(unit.name, unit.kind) for unit in units] == [
        (f"model.layers.{layer}.{name}", kind)
        for layer in range(2)
        for name, kind in (("blender", "attention"), ("grinder", "ffn"))
    ]


def _why(model: fx.GraphModule, name: str) -> str:
    return match_units(model).why(name)


def test_why_of_a_match(tiny: Callable) -> None:
    model = tiny().graph
    units = {unit.name: unit for unit in match_units(model).units}
    for name, kind, operators in (
        ("model.layers.1.mlp", "ffn", "row-wise operators (mul, silu)"),
        ("model.layers.0.self_attn", "attention", "attention scores (scaled_dot_product_attention)"),
    ):
        said, unit = _why(model, name), units[name]
        assert said.startswith(f"{name}: matched as {kind} of width 32")
        for part in (operators, f"%{unit.x}", f"%{unit.y}", f"%{unit.add}"):
            assert part in said


def test_why_of_an_unknown_name_shows_what_units_are_called(tiny: Callable) -> None:
    assert _why(tiny().graph, "layers.9.mlp") == (
        "layers.9.mlp: no submodule of that name holds linears; "
        "units are named like model.layers.0.self_attn, model.layers.0.mlp"
    )


def test_why_does_not_take_a_part_of_a_name_for_the_name(tiny: Callable) -> None:
    assert "no submodule of that name" in _why(tiny().graph, "lp")


def test_why_without_any_unit() -> None:
    assert MatchResult((), ()).why("x").endswith("units are named like model.layers.0.mlp")


def test_a_mux_is_a_call_of_a_module_of_that_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x_mux")
    assert not is_mux(x)
    assert is_mux(graph.call_module("mlp_mux", (x,)))
    assert not is_mux(graph.call_module("mlp_mux.inner", (x,)))
    assert not is_mux(graph.call_module("muxer", (x,)))


def _unit(name: str) -> Unit:
    return Unit(name, "ffn", 0, "block", "target", "call", "the_x", "the_y", "add", 8, "it is one")


MATCHED = "a.mlp: matched as ffn of width 8, because it is one, "


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.mlp", MATCHED),
        ("mlp", MATCHED),
        ("a.attention", "a.attention: not matched: it has a reason"),
        ("attention", "a.attention: not matched: it has a reason"),
        ("ttention", "ttention: no submodule of that name holds linears; units are named like a.mlp, b.mlp"),
        ("lp", "lp: no submodule of that name holds linears; units are named like a.mlp, b.mlp"),
    ],
)
def test_why_takes_whole_names_or_the_ends_of_paths(name: str, said: str) -> None:
    units = _unit("a.mlp"), _unit("b.mlp"), _unit("c.mlp")
    assert MatchResult(units, (Refusal("a.attention", "it has a reason"),)).why(name).startswith(said)


def test_a_linear_alone_is_no_submodule_that_holds_linears() -> None:
    assert _has_linear(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    assert not _has_linear(nn.Linear(2, 2))
    assert not _has_linear(nn.Sequential(nn.ReLU()))
