"""Matching of small hand-written decoders: unusual names, and near misses with their reasons."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.clean_up import CleanUp
from passes.match import after_call, match_units

WIDTH = 16


class Blender(nn.Module):
    """Causal attention with a softmax of its own and a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.all_three = nn.Linear(WIDTH, 3 * WIDTH)
        self.back = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.all_three(x).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2) / WIDTH**0.5
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        result: torch.Tensor = self.back(scores.softmax(-1) @ v)
        return result


class Grinder(nn.Module):
    """An FFN; subclasses break it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.up(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.inner(x))
        return result


def spoilt(name: str, **methods: Callable) -> type[Grinder]:
    """An FFN with a different `inner` or `forward`."""
    return type(name, (Grinder,), methods)


FeatureSoftmax = spoilt("FeatureSoftmax", inner=lambda self, x: self.up(x).softmax(-1))
Cumulative = spoilt("Cumulative", inner=lambda self, x: self.up(x).cumsum(1))
Rolled = spoilt("Rolled", inner=lambda self, x: self.up(x).roll(1, 1))
TokenSoftmax = spoilt("TokenSoftmax", inner=lambda self, x: self.up(x).softmax(1))
TokenMean = spoilt("TokenMean", inner=lambda self, x: self.up(x) - self.up(x).mean(1, keepdim=True))
Scaled = spoilt("Scaled", forward=lambda self, x: Grinder.forward(self, x) * 0.5)
# A sum of two linears, of the stream's width; a product of the wrong width; no linear reads the input as it is.
SumOfTwo = spoilt("SumOfTwo", forward=lambda self, x: Grinder.forward(self, x) + self.down(self.up(x)))
NarrowSum = spoilt("NarrowSum", forward=lambda self, x: Grinder.forward(self, x)[..., :1] * 0.5)
LateLinear = spoilt("LateLinear", forward=lambda self, x: Grinder.forward(self, F.gelu(x)))


class SplitGate(Grinder):
    """One wide linear, cut into gate and value along the features."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return F.silu(hidden[..., : 2 * WIDTH]) * hidden[..., 2 * WIDTH :]


class Narrow(Grinder):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(2 * WIDTH, 1)


class TwoInputs(Grinder):
    def forward(self, x: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(F.gelu(self.up(x)) * self.up(raw))
        return result


class LooseAttention(Blender):
    """Attention whose result no linear makes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class Calm(nn.Module):
    """Holds no linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)


class Stage(nn.Module):
    """A decoder layer with unusual names."""

    def __init__(self, grinder: nn.Module) -> None:
        super().__init__()
        self.calm_a, self.blender = nn.LayerNorm(WIDTH), Blender()
        self.calm_b, self.grinder = nn.LayerNorm(WIDTH), grinder

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        stream = stream + self.blender(self.calm_a(stream))
        return self.join(stream, self.calm_b(stream))

    def join(self, stream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return stream + self.grinder(x)


class PostNorm(Stage):
    """An extra norm and a factor between the FFN and its residual add."""

    def __init__(self, grinder: nn.Module) -> None:
        super().__init__(grinder)
        self.calm_c = nn.LayerNorm(WIDTH)

    def join(self, stream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return stream + self.calm_c(self.grinder(x)) * 0.5


class WeightFirst(PostNorm):
    """The factor is a weight and the first argument of the product."""

    def __init__(self, grinder: nn.Module) -> None:
        super().__init__(grinder)
        self.factor = nn.Parameter(torch.ones(WIDTH))

    def join(self, stream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return stream + self.factor * self.calm_c(self.grinder(x))


def joined(name: str, join: Callable, base: type[Stage] = Stage) -> type[Stage]:
    """A layer with a different `join`."""
    return type(name, (base,), {"join": join})


PostSum = joined("PostSum", lambda self, h, x: h + self.calm_c(self.grinder(x)).cumsum(1), PostNorm)  # mixes tokens
GivesTwo = joined("GivesTwo", lambda self, h, x: h + self.grinder(x, h))
AddsTwice = joined("AddsTwice", lambda self, h, x: (h + (y := self.grinder(x))) * (x + y))
ReadsTwice = joined("ReadsTwice", lambda self, h, x: (h + (y := self.grinder(x))) * y.tanh())
Multiplies = joined("Multiplies", lambda self, h, x: h * self.grinder(x))


class Machine(nn.Module):
    """Stages one after the other, registered in the opposite order."""

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        self.count = len(stages)
        for index in reversed(range(self.count)):
            self.add_module(f"stage_{index}", stages[index])

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        for index in range(self.count):
            stream = self.get_submodule(f"stage_{index}")(stream)
        return stream


def test_units_come_in_the_order_in_which_a_token_meets_them(captured_module: Callable) -> None:
    model = captured_module(Machine(Stage(Grinder()), Stage(SplitGate())), torch.randn(2, 5, WIDTH))
    found = match_units(model)
    assert found.refusals == ()
    assert [(unit.name, unit.kind, unit.layer, unit.width) for unit in found.units] == [
        ("stage_0.blender", "attention", 0, WIDTH),
        ("stage_0.grinder", "ffn", 0, WIDTH),
        ("stage_1.blender", "attention", 1, WIDTH),
        ("stage_1.grinder", "ffn", 1, WIDTH),
    ]


@pytest.mark.parametrize("ffn", [SplitGate, FeatureSoftmax, Scaled])
def test_operators_along_the_features_keep_tokens_apart(captured_module: Callable, ffn: type[Grinder]) -> None:
    model = captured_module(Machine(Stage(ffn())), torch.randn(2, 5, WIDTH))
    assert [unit.kind for unit in match_units(model).units] == ["attention", "ffn"]


@pytest.mark.parametrize("stage", [PostNorm, WeightFirst])
def test_a_norm_and_a_factor_before_the_add_belong_to_the_unit(captured_module: Callable, stage: type[Stage]) -> None:
    model = captured_module(Machine(stage(Grinder())), torch.randn(2, 5, WIDTH))
    unit = match_units(model).units[1]
    nodes = {node.name: node for node in model.get_submodule("stage_0").graph.nodes}
    assert [str(node.target) for node in after_call(nodes, unit)] == ["calm_c", "aten.mul.Tensor"]
    assert nodes[unit.y].users == {nodes[unit.add]: None}


def test_a_module_that_gives_what_it_is_given_does_not_stand_between(captured_module: Callable) -> None:
    """Such as a dropout that was captured in eval mode and cleaned up."""
    stage = PostNorm(Grinder())
    stage.calm_c = nn.Dropout(0.5).eval()
    model = captured_module(Machine(stage), torch.randn(2, 5, WIDTH))
    assert CleanUp().call(model).modified
    assert [unit.name for unit in match_units(model).units] == ["stage_0.blender", "stage_0.grinder"]


MIXES = "it holds no attention scores, and {} may mix tokens; expected linears and row-wise operators"
NEAR_MISSES = [
    (PostSum, Grinder, "none of its outputs is added to the residual stream"),
    (GivesTwo, TwoInputs, "its linears read 2 inputs (%layer_norm_1, %add); expected one normed hidden state"),
    (AddsTwice, Grinder, "its outputs feed 2 adds; expected one residual add"),
    (ReadsTwice, Grinder, "its output %grinder has 2 readers; expected the residual add alone"),
    (Stage, Cumulative, MIXES.format("cumsum")),
    (Stage, Rolled, MIXES.format("roll")),
    (Stage, TokenSoftmax, MIXES.format("softmax")),
    (Stage, TokenMean, MIXES.format("mean")),
    (Stage, NarrowSum, "its output is made by aten.mul.Tensor; expected a linear"),
    (Stage, LateLinear, "its linears read 0 inputs (none); expected one normed hidden state"),
    (Stage, LooseAttention, "its output is made by aten.mul.Tensor; expected a linear"),
    (Stage, Narrow, "its last module down does not return the width 16 of the stream"),
]


@pytest.mark.parametrize(
    ("stage", "ffn", "reason"), NEAR_MISSES, ids=[f"{stage.__name__}-{ffn.__name__}" for stage, ffn, _ in NEAR_MISSES]
)
def test_near_miss_says_why(captured_module: Callable, stage: type[Stage], ffn: type[nn.Module], reason: str) -> None:
    model = captured_module(Machine(stage(ffn())), torch.randn(2, 5, WIDTH))
    found = match_units(model)
    assert [unit.name for unit in found.units] == ["stage_0.blender"]
    assert [refusal.name for refusal in found.refusals] == ["stage_0.grinder"]
    assert found.refusals[0].reason == reason
    assert found.why("grinder") == f"stage_0.grinder: not matched: {found.refusals[0].reason}"


def test_a_sum_of_the_width_of_the_stream_is_an_ffn(captured_module: Callable) -> None:
    model = captured_module(Machine(Stage(SumOfTwo())), torch.randn(2, 5, WIDTH))
    assert [unit.name for unit in match_units(model).units] == ["stage_0.blender", "stage_0.grinder"]


def test_what_holds_no_linear_is_neither_a_unit_nor_a_near_miss(captured_module: Callable) -> None:
    found = match_units(captured_module(Machine(Stage(Calm())), torch.randn(2, 5, WIDTH)))
    assert [unit.name for unit in found.units] == ["stage_0.blender"]
    assert found.refusals == ()


def test_a_layer_is_counted_where_its_first_unit_is_refused(captured_module: Callable) -> None:
    """One unit of the first layer is left, none of the second, both of the third: layers 0 and 1."""

    class NoUnit(Stage):
        def forward(self, stream: torch.Tensor) -> torch.Tensor:
            return self.join(stream, self.calm_b(stream))

    stages = Stage(Cumulative()), NoUnit(Rolled()), Stage(Grinder())
    found = match_units(captured_module(Machine(*stages), torch.randn(2, 5, WIDTH)))
    assert [(unit.name, unit.layer) for unit in found.units] == [
        ("stage_0.blender", 0),
        ("stage_2.blender", 1),
        ("stage_2.grinder", 1),
    ]
    assert [refusal.name for refusal in found.refusals] == ["stage_0.grinder", "stage_1.grinder"]


def test_the_outermost_graph_is_no_layer(captured_module: Callable) -> None:
    found = match_units(captured_module(Stage(Grinder()), torch.randn(2, 5, WIDTH)))
    assert (found.units, found.refusals) == ((), ())


def test_a_submodule_without_a_graph_says_so(captured_module: Callable) -> None:
    model = captured_module(Machine(Stage(Grinder())), torch.randn(2, 5, WIDTH))
    model.get_submodule("stage_0").add_module("grinder", Grinder())
    assert match_units(model).refusals[0].reason == "it was captured without a graph of its own"


@pytest.mark.parametrize("count", [1, 2])
def test_a_list_of_one_result_is_that_result(captured_module: Callable, count: int) -> None:
    model = captured_module(Machine(Stage(Grinder())), torch.randn(2, 5, WIDTH))
    output = next(node for node in model.get_submodule("stage_0.grinder").graph.nodes if node.op == "output")
    output.args = ((output.all_input_nodes[0],) * count,)
    found = match_units(model)
    assert [unit.target for unit in found.units] == ["blender", "grinder"][: 3 - count]
    said = ["its output is made by (down, down); expected a linear"][: count - 1]
    assert [refusal.reason for refusal in found.refusals] == said


class Chained(Stage):  # a second FFN between the first and the residual add
    def __init__(self, grinder: nn.Module) -> None:
        super().__init__(grinder)
        self.second = Grinder()

    def join(self, stream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return stream + self.second(self.grinder(x))


@pytest.mark.parametrize("stage", [Chained, Multiplies])
def test_what_reaches_no_add_by_itself_is_no_unit(captured_module: Callable, stage: type[Stage]) -> None:
    model = captured_module(Machine(stage(Grinder())), torch.randn(2, 5, WIDTH))
    reason = "none of its outputs is added to the residual stream"
    assert [(r.name, r.reason) for r in match_units(model).refusals] == [("stage_0.grinder", reason)]
