"""A table of operators and arguments: which of them treat each token separately."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from passes.row_wise import is_row_wise

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
