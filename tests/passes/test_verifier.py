from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import fx, nn

from passes.base import PassManager
from passes.verifier import RULES, verify_model


@pytest.fixture
def model(tiny: Callable, insertions: tuple) -> fx.GraphModule:
    return PassManager(insertions).run(tiny().graph).model


def _layer(model: fx.GraphModule) -> nn.Module:
    return model.get_submodule("model.layers.0")


def _node(model: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in _layer(model).graph.nodes if node.name == name)


def _delete_submodule(model: fx.GraphModule) -> None:
    delattr(_layer(model), "mlp_forecaster")


def _take_the_forecast_away(model: fx.GraphModule) -> None:
    mux = _node(model, "mlp_mux")
    mux.args = mux.args[:1]


def _give_a_fourth_argument(model: fx.GraphModule) -> None:
    mux = _node(model, "mlp_mux")
    mux.args = (*mux.args, mux.args[0])


def _skip_the_mux(model: fx.GraphModule) -> None:
    mux = _node(model, "mlp_mux")
    mux.replace_all_uses_with(mux.args[0])


def _feed_two_nodes(model: fx.GraphModule) -> None:
    mux = _node(model, "self_attn_mux")
    _node(model, "mlp").args = (mux,)


def _feed_something_else(model: fx.GraphModule) -> None:
    add = next(iter(_node(model, "self_attn_mux").users))
    add.target = fx.Node  # any other function


def _feed_a_module_alone(model: fx.GraphModule) -> None:
    mux = _node(model, "self_attn_mux")
    mux.replace_all_uses_with(mux.args[0])
    _node(model, "mlp").args = (mux,)


def _route_by_another_input(model: fx.GraphModule) -> None:
    _node(model, "mlp_router").args = _node(model, "self_attn_router").args


def _use_before_definition(model: fx.GraphModule) -> None:
    _node(model, "mlp_mux").prepend(_node(model, "mlp_router"))
    _node(model, "mlp_mux").append(_node(model, "mlp_forecaster"))


def _point_to_a_missing_weight(model: fx.GraphModule) -> None:
    norm = model.get_submodule("model.layers.0.input_layernorm")
    next(node for node in norm.graph.nodes if node.op == "get_attr").target = "nothing"


BREAKAGES = [
    (_delete_submodule, RULES[0][0], "mlp_forecaster, which does not exist"),
    (_take_the_forecast_away, RULES[1][0], "not 1 arguments"),
    (_give_a_fourth_argument, RULES[1][0], "not 4 arguments"),
    (_skip_the_mux, RULES[2][0], "not 0 nodes"),
    (_feed_two_nodes, RULES[2][0], "not 2 nodes"),
    (_feed_something_else, RULES[2][0], "not Node"),
    (_feed_a_module_alone, RULES[2][0], "not mlp"),
    (_route_by_another_input, RULES[3][0], "reads neither"),
    (_use_before_definition, "fx lint", "before"),
    (_point_to_a_missing_weight, "fx lint", "nonexistent attribute nothing"),
]


def test_captured_and_rewritten_models_are_valid(tiny: Callable, model: fx.GraphModule) -> None:
    assert verify_model(tiny().graph) == []
    assert verify_model(model) == []


@pytest.mark.parametrize(("break_it", "rule", "message"), BREAKAGES, ids=[b[0].__name__ for b in BREAKAGES])
def test_broken_rule_is_named_with_its_place(
    model: fx.GraphModule, break_it: Callable, rule: str, message: str
) -> None:
    break_it(model)
    problems = [problem for problem in verify_model(model) if problem.rule == rule]
    assert len(problems) == 1
    assert message in problems[0].message
    assert problems[0].where.startswith("model.layers.0")


def test_every_rule_is_broken_by_some_test() -> None:
    assert {rule for rule, _ in RULES} <= {rule for _, rule, _ in BREAKAGES}


def test_problem_names_the_node(model: fx.GraphModule) -> None:
    _take_the_forecast_away(model)
    assert "model.layers.0, node %mlp_mux" in {problem.where for problem in verify_model(model)}


def test_leaves_without_a_graph_are_no_concern() -> None:
    assert verify_model(nn.Linear(2, 2)) == []
