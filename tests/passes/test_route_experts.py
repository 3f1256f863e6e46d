from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from irc.model.experts import Experts
from passes.base import PassManager
from passes.printer import print_model
from passes.route_experts import RouteExperts

WIDTH, COUNT, EACH = 16, 5, 2


@pytest.mark.parametrize("normalised", [True, False])
@torch.no_grad()
def test_each_expert_computes_the_tokens_that_chose_it(captured_module: Callable, normalised: bool) -> None:
    mixture, x = Experts(WIDTH, 24, COUNT, EACH, normalised, "silu"), torch.randn(2, 7, WIDTH)
    model = captured_module(mixture, x)
    expected = mixture(x)
    assert PassManager([RouteExperts()]).run(model).modified
    met: dict[str, int] = {}
    for name in (f"experts.{i}" for i in range(COUNT)):
        hook = lambda module, args, name=name: met.update({name: args[0].shape[1]})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    found = model(x)
    torch.testing.assert_close(found[0] if isinstance(found, (list, tuple)) else found, expected, rtol=0, atol=1e-6)
    assert len(met) == COUNT
    assert sum(met.values()) == 2 * 7 * EACH  # every expert on every token would be 2 * 7 * COUNT


def test_second_run_changes_nothing(captured_module: Callable) -> None:
    model = captured_module(Experts(WIDTH, 24, COUNT, EACH, True, "silu"), torch.randn(2, 7, WIDTH))
    PassManager([RouteExperts()]).run(model)
    text = print_model(model)
    assert not PassManager([RouteExperts()]).run(model).modified
    assert print_model(model) == text


aten, irc = torch.ops.aten, torch.ops.irc


def test_a_mixture_behind_a_linear_is_found(captured_module: Callable) -> None:
    mixture = Experts(WIDTH, 24, COUNT, EACH, True, "silu")
    model = captured_module(nn.Sequential(nn.Linear(WIDTH, WIDTH), mixture), torch.randn(2, 7, WIDTH))
    assert RouteExperts().call(model).modified
    nodes = model.get_submodule("1").graph.nodes
    assert sum(node.target == irc.scatter_add.default for node in nodes) == COUNT


def _term(
    *,
    twice: bool = False,
    arguments: int = 1,
    summed: Any = None,
    times: Any = aten.mul,
    equal: Any = aten.eq,
    factor_first: bool = False,
    add: str = "behind",
) -> fx.GraphModule:
    """Return base + expert(x) * sum(weights * (index == 1)) of one expert."""
    graph = fx.Graph()
    x, weights, index, base = (graph.placeholder(name) for name in ("x", "weights", "index", "base"))
    call = graph.call_module("expert", (x,) * arguments)
    chosen = graph.call_function(equal.Scalar, (index, 1))
    product = graph.call_function(times.Tensor, (weights, chosen))
    target, rest = summed or (aten.sum.dim_IntList, ([-1], True))
    weight = graph.call_function(target, (product, *rest))
    term = graph.call_function(aten.mul.Tensor, (weight, call) if factor_first else (call, weight))
    term.meta["val"] = "a term"
    result = term
    if add:
        result = graph.call_function(aten.add.Tensor, (base, term) if add == "behind" else (term, base))
        result.meta["val"] = "a sum"
    graph.output((result, call) if twice else (result,))
    return fx.GraphModule(nn.ModuleDict({"expert": nn.Bilinear(8, 8, 8) if arguments == 2 else nn.Linear(8, 8)}), graph)


def _inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, 8), torch.rand(2, 3, 2), torch.randint(0, 3, (2, 3, 2)), torch.randn(2, 3, 8)


@pytest.mark.parametrize("add", ["behind", "before", ""])
@torch.no_grad()
def test_a_term_is_added_to_what_stands_before_it_or_to_nothing(add: str) -> None:
    model, inputs = _term(add=add), _inputs()
    expected = model(*inputs)[0]
    assert RouteExperts().call(model).modified
    torch.testing.assert_close(model(*inputs)[0], expected, rtol=0, atol=1e-6)
    whole = next(node for node in model.graph.nodes if node.target == irc.scatter_add.default)
    assert whole.meta["val"] == ("a sum" if add == "behind" else "a term")
    assert [node.target for node in model.graph.nodes if node.op == "call_module"] == ["expert"]
    kept = {node.target for node in model.graph.nodes} & {aten.add.Tensor, aten.zeros_like.default}
    assert (
        kept
        == {"behind": set(), "before": {aten.add.Tensor, aten.zeros_like.default}, "": {aten.zeros_like.default}}[add]
    )


ALMOST: dict[str, dict[str, Any]] = {
    "an expert that is read": {"twice": True},
    "two inputs": {"arguments": 2},
    "another sum": {"summed": (aten.amax.default, ([-1], True))},
    "no product": {"times": aten.add},
    "another choice": {"equal": aten.ge},
    "the weight first": {"factor_first": True},
}


@pytest.mark.parametrize("options", ALMOST.values(), ids=ALMOST)
def test_what_is_almost_a_term_is_left_alone(options: dict[str, Any]) -> None:
    model = _term(**options)
    text = print_model(model)
    assert not RouteExperts().call(model).modified
    assert print_model(model) == text


def test_a_factor_that_is_a_number_is_no_weight() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(aten.mul.Tensor, (graph.call_module("expert", (graph.placeholder("x"),)), 2.0)))
    assert not RouteExperts().call(fx.GraphModule(nn.ModuleDict({"expert": nn.Linear(8, 8)}), graph)).modified
