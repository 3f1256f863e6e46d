from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

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
    assert found["rms_norm"] == 2 * 2 + 2 * 2 + 1  # two a layer, q and k of each, and the last
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
