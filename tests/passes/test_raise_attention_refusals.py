"""RaiseAttention on near misses: every difference from supported attention is refused by name."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx
from transformers import Phi3Config

from passes.base import PassError, PassManager
from passes.printer import print_graph
from passes.raise_attention import RaiseAttention
from passes.raise_norms import RaiseNorms
from passes.split_fused_linears import SplitFusedLinears

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
NAME = "model.layers.0.self_attn"


def _first(graph: fx.Graph, target: object) -> fx.Node:
    return next(node for node in graph.nodes if node.target == target)


def _put_between(node: fx.Node, reader: fx.Node, target: object, *others: object) -> None:
    """Let `reader` read target(node, *others) instead of a node."""
    with node.graph.inserting_before(reader):
        new = node.graph.call_function(target, (node, *others))
    new.meta["val"] = node.meta["val"]
    reader.replace_input_with(node, new)


def _twice(graph: fx.Graph) -> None:
    scores = _first(graph, SDPA)
    with graph.inserting_after(scores):
        graph.node_copy(scores)


def _additive_mask(graph: fx.Graph) -> None:
    mask = _first(graph, SDPA).args[3]
    mask.meta["val"] = mask.meta["val"].float()


def _causal(graph: fx.Graph) -> None:
    scores = _first(graph, SDPA)
    scores.kwargs = {**scores.kwargs, "is_causal": True}


def _keys_of_no_cache(graph: fx.Graph) -> None:
    scores = _first(graph, SDPA)
    scores.args = (scores.args[0], scores.args[0], *scores.args[2:])


def _cache_of_another_dimension(graph: fx.Graph) -> None:
    keys = next(node for node in graph.nodes if node.target == aten.cat.default and node.args[1] == -2)
    keys.args = (keys.args[0], 1)


def _cache_of_no_dimension(graph: fx.Graph) -> None:
    keys = next(node for node in graph.nodes if node.target == aten.cat.default and node.args[1] == -2)
    keys.args = keys.args[:1]


def _past_behind(graph: fx.Graph) -> None:
    values = [node for node in graph.nodes if node.target == aten.cat.default and node.args[1] == -2][1]
    values.args = (values.args[0][::-1], -2)


def _cache_of_three(graph: fx.Graph) -> None:
    values = [node for node in graph.nodes if node.target == aten.cat.default and node.args[1] == -2][1]
    values.args = ([*values.args[0], values.args[0][1]], -2)


def _other_dimensions_transposed(graph: fx.Graph) -> None:
    heads = _first(graph, aten.transpose.int)
    heads.args = (heads.args[0], 1, 3)


def _heads_of_four_dimensions(graph: fx.Graph) -> None:
    _put_between(_first(graph, aten.view.default), _first(graph, aten.transpose.int), aten.neg.default)


def _rotation_adds_something_else(graph: fx.Graph) -> None:
    rotated = _first(graph, aten.add.Tensor)
    _put_between(rotated.args[1], rotated, aten.neg.default)


def _halves(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.target == aten.cat.default and node.args[1] == -1)


def _rotation_of_one_part(graph: fx.Graph) -> None:
    joined = _halves(graph)
    joined.args = (joined.args[0][:1], -1)


def _rotation_without_parts(graph: fx.Graph) -> None:
    joined = _halves(graph)
    joined.replace_all_uses_with(joined.args[0][1])


def _halves_the_other_way_round(graph: fx.Graph) -> None:
    """Rotates backward: (left, -right) where (-right, left) belongs."""
    joined = _halves(graph)
    joined.args = (joined.args[0][::-1], -1)


def _halves_not_negated(graph: fx.Graph) -> None:
    joined = _halves(graph)
    negated, left = joined.args[0]
    joined.args = ([negated.args[0], left], -1)


def _halves_that_overlap(graph: fx.Graph) -> None:
    left = _halves(graph).args[0][1]
    left.args = (*left.args[:3], left.args[3] + 1)


def _halves_of_other_heads(graph: fx.Graph) -> None:
    left = _halves(graph).args[0][1]
    left.args = ([node for node in graph.nodes if node.target == aten.transpose.int][1], *left.args[1:])


def _halves_of_tokens(graph: fx.Graph) -> None:
    left = _halves(graph).args[0][1]
    left.args = (left.args[0], 2, *left.args[2:])


def _angles_of_heads(graph: fx.Graph) -> None:
    angles = _first(graph, aten.unsqueeze.default)
    angles.args = (angles.args[0], 2)


def _result_of_scores_scaled(graph: fx.Graph) -> None:
    scores = _first(graph, SDPA)
    _put_between(scores, next(iter(scores.users)), aten.mul.Tensor, 2.0)


def _result_of_scores_read_twice(graph: fx.Graph) -> None:
    scores = _first(graph, SDPA)
    with graph.inserting_after(scores):
        graph.call_function(aten.neg.default, (scores,))


def _result_of_scores_beside_the_output_linear(graph: fx.Graph) -> None:
    """The linear reads what the queries read, and the scores' result is one of the unit's own."""
    linear, output = _first(graph, "o_proj"), next(iter(graph.find_nodes(op="output")))
    output.args = ([*output.args[0], linear.args[0]],)
    linear.args = _first(graph, "q_proj").args


CHANGES = [
    (_twice, "2 attention operators in one unit; expected one"),
    (_additive_mask, "mask"),
    (_causal, "causal"),
    (_keys_of_no_cache, "keys or values come from aten.add.Tensor"),
    (_cache_of_another_dimension, "cache"),
    (_cache_of_no_dimension, "cache"),
    (_past_behind, "cache"),
    (_cache_of_three, "cache"),
    (_other_dimensions_transposed, "heads come from aten.transpose.int"),
    (_heads_of_four_dimensions, "not split"),
    (_rotation_adds_something_else, "not a rotation"),
    (_rotation_of_one_part, "two halves"),
    (_rotation_without_parts, "two halves"),
    (_halves_the_other_way_round, "8 features at 4"),
    (_halves_not_negated, "8 features at 4"),
    (_halves_that_overlap, "8 features at 4"),
    (_halves_of_other_heads, "8 features at 4"),
    (_halves_of_tokens, "8 features at 4"),
    (_angles_of_heads, "cosines"),
    (_result_of_scores_scaled, "through aten.mul.Tensor"),
    (_result_of_scores_beside_the_output_linear, "output linear"),
    (_result_of_scores_read_twice, "through aten.scaled_dot_product_attention.default"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_almost_known_attention_is_refused_by_name(tiny: Callable, change: Callable, reason: str) -> None:
    graph = tiny().graph
    change(graph.get_submodule(NAME).graph)
    with pytest.raises(PassError) as caught:
        RaiseAttention().call(graph)
    assert caught.value.where == NAME
    assert reason in caught.value.expected
    assert caught.value.remedy


@pytest.fixture
def partial(tiny_of: Callable) -> fx.GraphModule:
    """Half of each head's features are rotated, the others are joined to them as they are."""
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    model = tiny_of(Phi3Config(**shape, **heads, partial_rotary_factor=0.5))
    PassManager([SplitFusedLinears(), RaiseNorms()]).run(model.graph)
    return model


@torch.no_grad()
def test_a_part_of_the_features_is_rotated(partial: object) -> None:
    ids = partial.ids(2, 7)
    before = partial.run(ids)
    assert PassManager([RaiseAttention()]).run(partial.graph).modified
    for got, expected in zip(partial.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    text = print_graph(partial.graph.get_submodule(NAME).graph)
    assert text.count("irc::rotary") == 2
    assert text.count("-1, 0, 2)") == 4, "of cosines and sines, twice, the half of 4 features"


def _rest(graph: fx.Graph) -> fx.Node:
    """Return the node that joins rotated features and others."""
    return next(n for n in graph.nodes if n.target == aten.cat.default and n.args[0][0].target == aten.add.Tensor)


def _three_parts(graph: fx.Graph) -> None:
    joined = _rest(graph)
    joined.args = ([*joined.args[0], joined.args[0][1]], -1)


def _rest_that_overlaps(graph: fx.Graph) -> None:
    rest = _rest(graph).args[0][1]
    rest.args = (*rest.args[:2], rest.args[2] - 1, *rest.args[3:])


def _rest_that_ends_early(graph: fx.Graph) -> None:
    rest = _rest(graph).args[0][1]
    rest.args = (*rest.args[:3], rest.meta["val"].shape[-1] + rest.args[2] - 1)


def _rest_of_other_heads(graph: fx.Graph) -> None:
    rest = _rest(graph).args[0][1]
    rest.args = ([node for node in graph.nodes if node.target == aten.transpose.int][2], *rest.args[1:])


def _rotated_from_outside(graph: fx.Graph) -> None:
    joined = _rest(graph)
    joined.args = ([next(node for node in graph.nodes if node.op == "placeholder"), joined.args[0][1]], -1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_three_parts, "3 parts"),
        (_rest_that_overlaps, "parts that are not"),
        (_rest_that_ends_early, "parts that are not"),
        (_rest_of_other_heads, "parts that are not"),
        (_rotated_from_outside, "parts that are not"),
    ],
)
def test_other_parts_than_rotated_and_the_rest_are_refused(partial: object, change: Callable, reason: str) -> None:
    change(partial.graph.get_submodule(NAME).graph)
    with pytest.raises(PassError) as caught:
        RaiseAttention().call(partial.graph)
    assert reason in caught.value.expected


def test_a_function_that_is_not_an_operator_is_named(tiny: Callable) -> None:
    """Heads that come from a Python function are refused, not followed."""
    graph = tiny().graph
    inner = graph.get_submodule(NAME).graph
    scores = _first(inner, SDPA)
    _put_between(scores.args[0], scores, operator.neg)
    with pytest.raises(PassError, match="<built-in function neg>"):
        RaiseAttention().call(graph)
