from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

from passes.base import PassManager
from passes.printer import print_graph, print_model
from passes.raise_norms import RaiseNorms

FAMILIES = ["llama", "llama-mha-biased-rope3", "mistral-sliding", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_kept_bit_for_bit(tiny: Callable, family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    ids = model.ids(2, 7)
    before = model.run(ids)
    assert PassManager([RaiseNorms()]).run(model.graph).modified
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_every_norm_becomes_one_operator(tiny: Callable, calls: Callable) -> None:
    graph = tiny("qwen3").graph
    PassManager([RaiseNorms()]).run(graph)
    found = calls(graph)
    assert found["rms_norm"] == 2 * 2 + 2 * 2 + 1  # two per layer, q and k of each, and the last
    assert "layernorm" not in print_graph(graph.get_submodule("model.layers.0").graph).replace("layernorm.weight", "")


def test_golden_layer(tiny: Callable, golden: Callable[[str], str]) -> None:
    graph = tiny().graph
    PassManager([RaiseNorms()]).run(graph)
    assert print_graph(graph.get_submodule("model.layers.1").graph) + "\n" == golden("layer_with_raised_norms")


def test_second_run_changes_nothing(tiny: Callable) -> None:
    graph = tiny().graph
    PassManager([RaiseNorms()]).run(graph)
    text = print_model(graph)
    assert not PassManager([RaiseNorms()]).run(graph).modified
    assert print_model(graph) == text


class _Norm(nn.Module):
    """A norm of some kind, as a captured submodule beside a linear."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "cubed":
            return self.weight * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6))
        if self.kind == "over tokens":
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6))
        if self.kind in ("1 + weight", "2 + weight"):
            return (int(self.kind[0]) + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class _Around(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.linear = _Norm(kind), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


@pytest.mark.parametrize("kind", ["cubed", "over tokens", "2 + weight"])
def test_what_only_looks_like_a_norm_is_left_alone(captured_module: Callable, kind: str) -> None:
    model = captured_module(_Around(kind), torch.randn(2, 3, 8))
    assert not PassManager([RaiseNorms()]).run(model).modified


@pytest.mark.parametrize("kind", ["plain", "1 + weight"])
def test_a_norm_by_hand_is_raised(captured_module: Callable, calls: Callable, kind: str) -> None:
    around, x = _Around(kind), torch.randn(2, 3, 8)
    model = captured_module(around, x)
    assert PassManager([RaiseNorms()]).run(model).modified
    assert calls(model)["rms_norm"] == 1
    torch.testing.assert_close(model(x)[0] if isinstance(model(x), (list, tuple)) else model(x), around(x))


aten = torch.ops.aten


@dataclass(frozen=True)
class _NormByHand:
    """The parts of a hand-written norm; the defaults make one that is raised.

    Attributes:
        cast: Returns what is squared, from (graph, x); a cast to float32 when None.
        power: Exponent, 2 for a root mean square.
        dims: Dimensions of the mean.
        eps: Added to the mean.
        weight_first: Whether the weight is the first factor.
        factor: Makes the arguments of an add from the weight, when not None.
        results: What the norm returns.
        inputs: How many inputs it has.
        normed: `x`, or `square` for a norm that scales the squares.
        weight: Name of the parameter.
    """

    cast: Any = None
    power: int = 2
    dims: tuple[int, ...] = (-1,)
    eps: float | int = 1e-6
    weight_first: bool = True
    factor: Any = None
    results: str = "norm"
    inputs: int = 1
    normed: str = "x"
    weight: str = "weight"


def _by_hand(**options: Any) -> fx.GraphModule:
    """Return a model that calls a norm of a linear's width once."""
    it = _NormByHand(**options)
    graph = fx.Graph()
    placeholders = [graph.placeholder(f"input_{index}") for index in range(it.inputs)]
    x = placeholders[0]
    wide = graph.call_function(aten.to.dtype, (x, torch.float32)) if it.cast is None else it.cast(graph, x)
    square = graph.call_function(aten.pow.Tensor_Scalar, (wide, it.power))
    mean = graph.call_function(aten.mean.dim, (square, list(it.dims), True))
    inverse = graph.call_function(aten.rsqrt.default, (graph.call_function(aten.add.Tensor, (mean, it.eps)),))
    scaled = graph.call_function(aten.mul.Tensor, (wide if it.normed == "x" else square, inverse))
    parameter = graph.create_node("get_attr", it.weight)
    made = parameter if it.factor is None else graph.call_function(aten.add.Tensor, *it.factor(parameter))
    pair = (made, scaled) if it.weight_first else (scaled, made)
    result = graph.call_function(aten.mul.Tensor, pair)
    graph.output({"norm": result, "x, norm": (wide, result), "norm, norm": (result, result), "x": wide}[it.results])
    norm = fx.GraphModule(nn.ParameterDict({"weight": torch.randn(8), "other": torch.randn(8)}), graph)

    outer = fx.Graph()
    given = [outer.placeholder(f"given_{index}") for index in range(it.inputs)]
    call = outer.call_module("norm", tuple(given))
    if "," in it.results:
        parts = [outer.call_function(operator.getitem, (call, index)) for index in range(2)]
        outer.output(tuple(parts))
    else:
        outer.output((call,))
    return fx.GraphModule(nn.ModuleDict({"norm": norm}), outer)


def _plus(*args: Any, **kwargs: Any) -> Callable:
    """Make the factor of a norm: an add of these arguments, None being the weight."""
    return lambda weight: (tuple(weight if argument is None else argument for argument in args), kwargs)


RAISED = {
    "plain": {},
    "the weight second": {"weight_first": False},
    "x beside it": {"results": "x, norm"},
    "1 + weight": {"factor": _plus(1, None)},
    "weight + 1": {"factor": _plus(None, 1)},
    "weight + 1.0, second": {"factor": _plus(None, 1.0), "weight_first": False},
    "no cast": {"cast": lambda graph, x: x},
}
LEFT_ALONE = {
    "cubed": {"power": 3},
    "over tokens": {"dims": (-2,)},
    "over tokens and features": {"dims": (-2, -1)},
    "no float for eps": {"eps": 1},
    "the square is scaled": {"normed": "square"},
    "another parameter": {"weight": "other"},
    "two inputs": {"inputs": 2},
    "two norms": {"results": "norm, norm"},
    "x alone": {"results": "x"},
    "2 + weight": {"factor": _plus(2, None)},
    "weight + 2": {"factor": _plus(None, 2)},
    "weight + weight": {"factor": _plus(None, None)},
    "1 + 2 weight": {"factor": _plus(1, None, alpha=2)},
    "another x is squared": {"cast": lambda graph, x: graph.call_function(aten.neg.default, (x,))},
}


@pytest.mark.parametrize("options", RAISED.values(), ids=RAISED)
def test_norms_that_are_raised(options: dict[str, Any]) -> None:
    model, x = _by_hand(**options), torch.randn(2, 3, 8)
    expected = model(x)
    weight = model.norm.weight.clone()
    assert PassManager([RaiseNorms()]).run(model).modified
    assert not any(node.op == "call_module" for node in model.graph.nodes)
    for got, wanted in zip(model(x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert torch.equal(model.norm.weight, weight)
    names = [node.target for node in model.graph.nodes if node.op == "get_attr"]
    assert names == (["norm.scale"] if "factor" in options else ["norm.weight"])
    if "factor" in options:
        assert not model.norm.scale.requires_grad


@pytest.mark.parametrize("options", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_almost_a_norm_is_left_alone(options: dict[str, Any]) -> None:
    model = _by_hand(**options)
    text = print_model(model)
    assert not PassManager([RaiseNorms()]).run(model).modified
    assert print_model(model) == text


def test_a_scale_of_16_bits_is_rounded_once() -> None:
    model = _by_hand(factor=_plus(1, None))
    model.norm.weight.data = torch.linspace(-0.01, 0.01, 8).bfloat16()
    PassManager([RaiseNorms()]).run(model)
    assert torch.equal(model.norm.scale, (1 + model.norm.weight.float()).bfloat16())
