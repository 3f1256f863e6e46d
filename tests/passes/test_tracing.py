"""Tracing without the cache of fake tensors and source lines gives the same graph and restores PyTorch's settings."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo import config
from torch.export import Dim, ExportedProgram, export, unflatten

from passes.tracing import tracing


class Mixing(nn.Module):
    """A symbolic number of rows, viewed, joined and multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        x = self.linear(x.view(x.shape[0], -1, 2, 4).transpose(1, 2).flatten(2).reshape(x.shape))
        joined = torch.cat([past, x], dim=1)
        return (joined @ joined.transpose(1, 2)).softmax(-1)


def exported() -> ExportedProgram:
    torch.manual_seed(0)
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) * 2
    return export(Mixing(), (torch.zeros(2, 3, 8), torch.zeros(2, 5, 8)), dynamic_shapes=shapes, strict=False)


def test_the_graph_is_the_same() -> None:
    usual = exported()
    with tracing():
        quick = exported()
    assert str(quick.graph) == str(usual.graph)
    for program, traced in ((usual, True), (quick, False)):
        (softmax,) = (node for node in program.graph.nodes if "softmax" in node.name)
        assert ("stack_trace" in softmax.meta) is traced
    x, past = torch.randn(4, 7, 8), torch.randn(4, 2, 8)
    assert torch.equal(quick.module()(x, past), usual.module()(x, past))
    assert str(quick.range_constraints) == str(usual.range_constraints)


def test_both_are_off_inside_alone() -> None:
    assert config.fake_tensor_cache_enabled
    assert not torch.fx.config.do_not_emit_stack_traces
    found = []

    def fail() -> None:
        with tracing():
            found.append((config.fake_tensor_cache_enabled, torch.fx.config.do_not_emit_stack_traces))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert found == [(False, True)]
    assert config.fake_tensor_cache_enabled
    assert not torch.fx.config.do_not_emit_stack_traces


def test_other_warnings_are_shown() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with tracing():
            copy.deepcopy(unflatten(exported()).module_call_graph)
            warnings.warn("treespec of a user's own", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in told if each.category is FutureWarning] == ["treespec of a user's own"]
