from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from passes.base import PassError, PassManager
from passes.printer import print_graph, print_model
from passes.raise_attention import RaiseAttention
from passes.raise_norms import RaiseNorms

FAMILIES = ["llama", "llama-mha-biased-rope3", "llama-3-layers", "mistral", "mistral-sliding", "qwen2", "qwen3"]
PASSES = (RaiseNorms(), RaiseAttention())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_numbers_are_kept(tiny: Callable, family: str) -> None:
    """Logits and cache equal the captured model's: 1e-5 absolute in fp32, with padding and with a past."""
    model = tiny(family)
    ids, mask = model.ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past = [torch.randn(2, *tensor.shape[1:2], 4, tensor.shape[3]) for tensor in model.no_past(2)]
    longer = torch.cat((torch.ones(2, 4, dtype=torch.int64), mask), dim=1)
    inputs = [(ids, mask, positions, *model.no_past(2)), (ids, longer, positions + 4, *past)]
    before = [model.graph(*given) for given in inputs]
    assert PassManager(PASSES).run(model.graph).modified
    for given, expected in zip(inputs, before, strict=True):
        got = model.graph(*given)
        torch.testing.assert_close(got[0][mask.bool()], expected[0][mask.bool()], rtol=0, atol=1e-5)
        assert len(got) == len(expected)
        for mine, theirs in zip(got[1:3], expected[1:3], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_mask_may_be_given_by_name_and_a_scale_left_out(tiny: Callable) -> None:
    """Llama's scale is the default."""
    model = tiny()
    ids = model.ids(2, 9)
    before = model.run(ids)
    for layer in range(2):
        inner = model.graph.get_submodule(f"model.layers.{layer}.self_attn").graph
        scores = next(node for node in inner.nodes if "scaled_dot_product" in str(node.target))
        scores.args, scores.kwargs = scores.args[:3], {"attn_mask": scores.args[3]}
    PassManager(PASSES).run(model.graph)
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("last", [3, -1])
@torch.no_grad()
def test_dimensions_may_be_counted_from_either_end(tiny: Callable, last: int) -> None:
    """Heads are transposed by 1 and 2 or -3 and -2, their halves sliced of dimension 3 or -1."""
    model = tiny()
    ids = model.ids(2, 9)
    before = model.run(ids)
    changed = {torch.ops.aten.transpose.int: 0, torch.ops.aten.slice.Tensor: 0}
    for node in _attention(model.graph).nodes:
        if node.target == torch.ops.aten.slice.Tensor and node.args[0].target == torch.ops.aten.transpose.int:
            node.args = (node.args[0], last, *node.args[2:])
        elif node.target == torch.ops.aten.transpose.int:
            node.args = (node.args[0], *((-3, -2) if last < 0 else (2, 1)))
        else:
            continue
        changed[node.target] += 1
    assert changed == {torch.ops.aten.transpose.int: 4, torch.ops.aten.slice.Tensor: 4}
    PassManager(PASSES).run(model.graph)
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_heads_may_be_normed_behind_the_transposition(tiny: Callable) -> None:
    """As Qwen3 does before the rotation: each head separately."""
    model = tiny("qwen3")
    ids = model.ids(2, 9)
    before = model.run(ids)
    PassManager([RaiseNorms()]).run(model.graph)
    graph = _attention(model.graph)
    norms = [node for node in graph.nodes if node.target == torch.ops.irc.rms_norm.default]
    assert len(norms) == 2
    for norm in norms:
        (turned,) = norm.users
        source = norm.args[0]
        turned.args = (source, *turned.args[1:])
        with graph.inserting_after(turned):
            behind = graph.call_function(norm.target, (turned, *norm.args[1:]))
        behind.meta["val"] = turned.meta["val"]
        turned.replace_all_uses_with(behind, delete_user_cb=lambda user, behind=behind: user is not behind)
        graph.erase_node(norm)
    assert PassManager([RaiseAttention()]).run(model.graph).modified
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_golden_attention(tiny: Callable, golden: Callable[[str], str]) -> None:
    graph = tiny("qwen3").graph
    PassManager(PASSES).run(graph)
    assert print_graph(graph.get_submodule("model.layers.1.self_attn").graph) + "\n" == golden("raised_attention")


def test_second_run_changes_nothing(tiny: Callable) -> None:
    graph = tiny().graph
    PassManager(PASSES).run(graph)
    text = print_model(graph)
    assert not PassManager(PASSES).run(graph).modified
    assert print_model(graph) == text


def _attention(graph: fx.GraphModule) -> fx.Graph:
    return graph.get_submodule("model.layers.0.self_attn").graph


def _without_mask(graph: fx.Graph, scores: fx.Node) -> None:
    scores.args = scores.args[:3]


def _with_dropout(graph: fx.Graph, scores: fx.Node) -> None:
    scores.kwargs = {**scores.kwargs, "dropout_p": 0.1}


def _with_scaled_heads(graph: fx.Graph, scores: fx.Node) -> None:
    with graph.inserting_before(scores):
        doubled = graph.call_function(torch.ops.aten.mul.Tensor, (scores.args[0], 2.0))
    doubled.meta["val"] = scores.args[0].meta["val"]
    scores.replace_input_with(scores.args[0], doubled)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without_mask, "mask"),
        (_with_dropout, "dropout"),
        (_with_scaled_heads, "aten.mul.Tensor"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(tiny: Callable, change: Callable, reason: str) -> None:
    graph = tiny().graph
    inner = _attention(graph)
    scores = next(node for node in inner.nodes if "scaled_dot_product" in str(node.target))
    change(inner, scores)
    with pytest.raises(PassError, match=f"model.layers.0.self_attn: RaiseAttention .*{reason}"):
        PassManager(PASSES).run(graph)
