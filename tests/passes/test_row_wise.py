"""Which operators keep tokens apart, to the matcher: a table of operators and arguments."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn

from passes.match import MatchResult, Refusal, Unit, _has_linear, is_mux, is_row_wise

aten = torch.ops.aten
END = 9223372036854775807
X, WEIGHT = "x", "weight"

KEPT_APART = [
    (aten.silu.default, (X,), {}),
    (aten.mul.Tensor, (X, X), {}),
    (aten.pow.Tensor_Scalar, (X, 2), {}),
    (operator.getitem, (X, 0), {}),
    (aten.softmax.int, (X, -1), {}),
    (aten.softmax.int, (X, 2), {}),
    (aten.mean.dim, (X, [-1], True), {}),
    (aten.mean.dim, (X, [2]), {}),
    (aten.sum.dim_IntList, (X, [-1, 2]), {}),
    (aten.chunk.default, (X, 2, -1), {}),
    (aten.chunk.default, (X, 2), {"dim": -1}),
    (aten.slice.Tensor, (X, -1, 0, 4), {}),
    (aten.slice.Tensor, (X, 0, 0, END), {}),
    (aten.slice.Tensor, (X, 1, 0, END), {}),
    (aten.layer_norm.default, (X, [8], WEIGHT), {}),
    (aten.rms_norm.default, (X, [8]), {}),
    (aten.topk.default, (X, 2), {}),
]
MIXED = [
    (aten.cumsum.default, (X, -1), {}),
    (aten.flip.default, (X, [1]), {}),
    (aten.softmax.int, (X, 1), {}),
    (aten.softmax.int, (X, 0), {}),
    (aten.softmax.int, (X, -2), {}),
    (aten.mean.dim, (X, [1]), {}),
    (aten.mean.dim, (X, [-1, 1]), {}),
    (aten.chunk.default, (X, 2), {}),
    (aten.chunk.default, (X, 2, 1), {}),
    (aten.chunk.default, (X, 2), {"dim": 1}),
    (aten.slice.Tensor, (X, 1, 0, 4), {}),
    (aten.slice.Tensor, (X, 1, 1, END), {}),
    (aten.layer_norm.default, (X, [5, 8]), {}),
    (aten.topk.default, (X, 2, 1), {}),
    (torch.sort, (X,), {}),
]


def _node(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any = None) -> fx.Node:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    if value is not None:
        x.meta["val"] = value
    given = tuple(x if argument is X else weight if argument is WEIGHT else argument for argument in args)
    return graph.call_function(target, given, kwargs)


def _name(row: Any) -> str:
    return " ".join(str(part) for part in (getattr(row[0], "__name__", row[0]), *row[1][1:], *row[2].values()))


@pytest.mark.parametrize("row", KEPT_APART, ids=_name)
def test_tokens_are_kept_apart(row: Any) -> None:
    assert is_row_wise(_node(*row, value=torch.empty(2, 5, 8)))


@pytest.mark.parametrize("row", MIXED, ids=_name)
def test_tokens_may_be_mixed(row: Any) -> None:
    assert not is_row_wise(_node(*row, value=torch.empty(2, 5, 8)))


def test_without_a_shape_only_the_last_dimension_from_the_end_is_known() -> None:
    assert is_row_wise(_node(aten.softmax.int, (X, -1), {}))
    assert not is_row_wise(_node(aten.softmax.int, (X, 2), {}))


def test_a_mux_is_a_call_of_a_module_of_that_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x_mux")
    assert not is_mux(x)
    assert is_mux(graph.call_module("mlp_mux", (x,)))
    assert not is_mux(graph.call_module("mlp_mux.inner", (x,)))
    assert not is_mux(graph.call_module("muxer", (x,)))


def _unit(name: str) -> Unit:
    return Unit(name, "ffn", 0, "block", "target", "call", "the_x", "the_y", "add", 8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.mlp", "a.mlp: matched as ffn; reads %the_x, its output %the_y is added to the residual stream"),
        ("mlp", "a.mlp: matched as ffn; reads %the_x, its output %the_y is added to the residual stream"),
        ("a.attention", "a.attention: not matched: it has a reason"),
        ("attention", "a.attention: not matched: it has a reason"),
        ("ttention", "ttention: no submodule of that name holds linears; units are named like a.mlp, b.mlp"),
        ("lp", "lp: no submodule of that name holds linears; units are named like a.mlp, b.mlp"),
    ],
)
def test_why_takes_whole_names_or_the_ends_of_paths(name: str, said: str) -> None:
    units = _unit("a.mlp"), _unit("b.mlp"), _unit("c.mlp")
    assert MatchResult(units, (Refusal("a.attention", "it has a reason"),)).why(name) == said


def test_a_linear_alone_is_no_submodule_that_holds_linears() -> None:
    assert _has_linear(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    assert not _has_linear(nn.Linear(2, 2))
    assert not _has_linear(nn.Sequential(nn.ReLU()))
