from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Phi3Config

from passes.base import PassManager, finish
from passes.printer import print_model
from passes.split_fused_linears import SplitFusedLinears


def test_phi3_gets_the_linears_of_a_llama(tiny_of: Callable) -> None:
    config = Phi3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = tiny_of(config)
    ids = model.ids(2, 7)
    before = model.run(ids)
    stored = model.graph.get_submodule("model.layers.0.self_attn.qkv_proj").weight.data_ptr()
    assert PassManager([SplitFusedLinears()]).run(model.graph).modified
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    layer = model.graph.get_submodule("model.layers.0")
    linears = {name: part.out_features for name, part in layer.named_modules() if isinstance(part, nn.Linear)}
    assert linears == {
        "self_attn.o_proj": 32,
        "self_attn.q_proj": 32,
        "self_attn.k_proj": 16,
        "self_attn.v_proj": 16,
        "mlp.gate_proj": 48,
        "mlp.up_proj": 48,
        "mlp.down_proj": 32,
    }
    assert layer.get_submodule("self_attn.q_proj").weight.data_ptr() == stored, "weights are views, not copies"
    assert not PassManager([SplitFusedLinears()]).run(model.graph).modified


class Whole(nn.Module):
    """A linear that one reader reads whole and another in part."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.both(x)
        result: torch.Tensor = self.last(y) * y[..., :8] + y[..., 8:]
        return result


def test_a_linear_that_is_read_whole_stays(captured_module: Callable) -> None:
    model = captured_module(Whole(), torch.randn(2, 3, 8))
    assert not PassManager([SplitFusedLinears()]).run(model).modified


class Parts(nn.Module):
    """A linear that `cut` splits into parts, summed with different weights."""

    def __init__(self, cut: Callable, name: str = "both", bias: bool = True) -> None:
        super().__init__()
        self.cut, self.name = cut, name
        self.add_module(name, nn.Linear(8, 12, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.cut(self.get_submodule(self.name)(x))
        return torch.cat([part * (index + 1) for index, part in enumerate(parts)], dim=-1)


def _chunked(y: torch.Tensor) -> Any:
    return y.chunk(2, dim=-1)


def _split_into_equal(y: torch.Tensor) -> Any:
    return y.split(4, dim=2)


def _split_by_sizes(y: torch.Tensor) -> Any:
    return y.split([2, 7, 3], dim=-1)


def _sliced_out_of_order(y: torch.Tensor) -> Any:
    return y[..., 5:], y[..., :5]


def _sliced_with_a_gap(y: torch.Tensor) -> Any:
    return y[..., 1:4], y[..., 6:]


CUTS = [
    (_chunked, [6, 6]),
    (_split_into_equal, [4, 4, 4]),
    (_split_by_sizes, [2, 7, 3]),
    (_sliced_out_of_order, [5, 7]),
    (_sliced_with_a_gap, [3, 6]),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("cut", "features"), CUTS, ids=[cut.__name__ for cut, _ in CUTS])
@torch.no_grad()
def test_every_kind_of_cut_gives_a_linear_a_part(
    captured_module: Callable, cut: Callable, features: list[int], bias: bool
) -> None:
    whole, x = Parts(cut, bias=bias), torch.randn(2, 3, 8)
    expected = whole(x)
    model = captured_module(whole, x)
    assert PassManager([SplitFusedLinears()]).run(model).modified
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert {name: part.out_features for name, part in linears.items()} == {
        f"both_{index}": count for index, count in enumerate(features)
    }
    assert {part.bias is not None for part in linears.values()} == {bias}
    assert not any(parameter.requires_grad for part in linears.values() for parameter in part.parameters())
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_parts_are_told_apart_by_index_not_by_place(captured_module: Callable) -> None:
    whole, x = Parts(_split_by_sizes), torch.randn(2, 3, 8)
    model = captured_module(whole, x)
    cut = next(node for node in model.graph.nodes if node.target == torch.ops.aten.split_with_sizes.default)
    for item in list(cut.users):
        cut.append(item)
    finish(model)
    assert SplitFusedLinears().call(model).modified
    torch.testing.assert_close(model(x)[0], whole(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "cut", "names"),
    [
        ("gate_up_proj", _chunked, ["gate_proj", "up_proj"]),
        ("qkv_proj", _split_into_equal, ["q_proj", "k_proj", "v_proj"]),
        ("gate_up_proj", _split_into_equal, ["gate_up_proj_0", "gate_up_proj_1", "gate_up_proj_2"]),
    ],
)
def test_known_linears_get_the_usual_names(captured_module: Callable, name: str, cut: Callable, names: list) -> None:
    model = captured_module(Parts(cut, name), torch.randn(2, 3, 8))
    PassManager([SplitFusedLinears()]).run(model)
    assert [name for name, part in model.named_modules() if isinstance(part, nn.Linear)] == names


def test_a_name_that_is_taken_is_not_given_again(captured_module: Callable) -> None:
    model = captured_module(Parts(_chunked, "gate_up_proj"), torch.randn(2, 3, 8))
    model.add_module("up_proj", nn.Identity())
    PassManager([SplitFusedLinears()]).run(model)
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    assert linears == ["gate_up_proj_0", "gate_up_proj_1"]


class CalledTwice(nn.Module):
    """One linear, called for two inputs, of whose outputs only the first is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.both(x).chunk(2, dim=-1)
        return left + 2 * right + self.both(left)[..., :8]


@torch.no_grad()
def test_a_linear_that_is_still_called_stays(captured_module: Callable) -> None:
    twice, x = CalledTwice(), torch.randn(2, 3, 8)
    expected = twice(x)
    model = captured_module(twice, x)
    assert PassManager([SplitFusedLinears()]).run(model).modified
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    assert sorted(names) == ["both", "both_0", "both_1"]
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-6)


def _of_tokens(y: torch.Tensor) -> Any:
    return y[:, :2], y[:, 2:]


def _chunks_of_tokens(y: torch.Tensor) -> Any:
    return y.split([1, 2], dim=1)


def _one_part(y: torch.Tensor) -> Any:
    return (y[..., :5],)


def _first_chunk_unread(y: torch.Tensor) -> Any:
    return (y.chunk(2, dim=-1)[1],)


@pytest.mark.parametrize("cut", [_of_tokens, _chunks_of_tokens, _one_part, _first_chunk_unread])
def test_what_is_no_cut_of_all_features_stays(captured_module: Callable, cut: Callable) -> None:
    class Joined(Parts):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([part.flatten(1) for part in self.cut(self.both(x))], dim=1)

    model = captured_module(Joined(cut), torch.randn(2, 3, 8))
    text = print_model(model)
    assert not PassManager([SplitFusedLinears()]).run(model).modified
    assert print_model(model) == text
