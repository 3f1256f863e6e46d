from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import Olmo2Config

from irc.model.modules import RoutingControl, StoredKeys
from passes.base import PassError, PassManager, finish
from passes.harden_routers import HardenRouters
from passes.lower_to_compaction import LowerToCompaction
from passes.mask_skipped_keys import MaskSkippedKeys
from passes.match import match_units
from passes.printer import print_graph, print_model
from passes.raise_attention import RaiseAttention
from passes.raise_norms import RaiseNorms

aten = torch.ops.aten
BEFORE = (RaiseNorms(), RaiseAttention(), HardenRouters())
FAMILIES = ["llama", "llama-mha-biased-rope3", "mistral-sliding", "qwen2", "qwen3"]


def _bias(graph: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for name, parameter in graph.named_parameters():
            if name.endswith("_router.2.bias"):
                parameter[0] += amount


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gates", ["mixed", "all executed", "all skipped"])
@torch.no_grad()
def test_numbers_are_those_of_the_hard_model(tiny: Callable, insertions: tuple, family: str, gates: str) -> None:
    """fp32, 1e-5 absolute: matrix products over fewer rows may round otherwise."""
    model = tiny(family)
    ids = model.ids(3, 9)
    PassManager([*insertions, *BEFORE]).run(model.graph)
    _bias(model.graph, {"mixed": 0.0, "all executed": 1e3, "all skipped": -1e3}[gates])
    before = model.run(ids)
    assert PassManager([LowerToCompaction()]).run(model.graph).modified
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_stands_between_a_unit_and_its_add_sees_the_rows_of_the_unit(tiny_of: Callable, insertions: tuple) -> None:
    """OLMo 2 has a norm there, behind attention and FFN."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = tiny_of(Olmo2Config(**shape, **heads, pad_token_id=None))
    ids = model.ids(3, 9)
    PassManager([*insertions, *BEFORE]).run(model.graph)
    before = model.run(ids)
    PassManager([LowerToCompaction()]).run(model.graph)
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    units, nodes = match_units(model.graph).units, model.graph.get_submodule("model.layers.0").graph.nodes
    whole = [node for node in nodes if node.name in [unit.add for unit in units]]
    assert [node.args[0].target for node in whole] == [torch.ops.irc.rms_norm.default] * 2


def _multiplied(add: fx.Node, choice: fx.Node) -> None:
    add.target = aten.mul.Tensor


def _doubled(add: fx.Node, choice: fx.Node) -> None:
    add.kwargs = {"alpha": 2}


def _added_to_a_number(add: fx.Node, choice: fx.Node) -> None:
    add.args = (choice, 0.5)


def _added_to_itself(add: fx.Node, choice: fx.Node) -> None:
    add.args = (choice, choice)


def _read_again(add: fx.Node, choice: fx.Node) -> None:
    with add.graph.inserting_after(add):
        more = add.graph.call_function(aten.mul.Tensor, (add, choice))
    add.replace_all_uses_with(more, lambda user: user is not more)


@pytest.mark.parametrize("change", [_multiplied, _doubled, _added_to_a_number, _added_to_itself, _read_again])
@torch.no_grad()
def test_a_choice_that_is_not_simply_added_is_made_whole(tiny: Callable, insertions: tuple, change: Callable) -> None:
    model = tiny()
    ids = model.ids(3, 9)
    PassManager([*insertions, *BEFORE]).run(model.graph)
    for unit in match_units(model.graph).units:
        block = model.graph.get_submodule(unit.block)
        choice = next(node for node in block.graph.nodes if node.name == unit.add)
        (add,) = choice.users
        change(add, choice)
        finish(block)
    before = model.run(ids)
    assert PassManager([LowerToCompaction()]).run(model.graph).modified
    for got, expected in zip(model.run(ids), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    nodes = [node for layer in range(2) for node in model.graph.get_submodule(f"model.layers.{layer}").graph.nodes]
    found = [node.target for node in nodes if node.target in (torch.ops.irc.scatter.default, aten.where.self)]
    assert found == [torch.ops.irc.scatter.default] * 8  # two for each unit


def _rows_seen(graph: nn.Module, ids: torch.Tensor, model: Any) -> dict[str, int]:
    seen: dict[str, int] = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, args[0].flatten(0, -2).shape[0])
        )
        for name, module in graph.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model.run(ids)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_skipped_tokens_reach_no_linear_but_k_v_and_the_router(tiny: Callable, insertions: tuple) -> None:
    model = tiny()
    PassManager([*insertions, *BEFORE, LowerToCompaction()]).run(model.graph)
    ids = model.ids(3, 9)
    _bias(model.graph, -1e3)
    rows = _rows_seen(model.graph, ids, model)
    for name, count in rows.items():
        gated = name.endswith(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
        assert count == (0 if gated else 27), name
    _bias(model.graph, 2e3)
    for name, count in _rows_seen(model.graph, ids, model).items():
        assert count == (0 if "_forecaster" in name else 27), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reduced_units_store_executed_tokens_only(
    tiny: Callable, insertions: tuple, control: RoutingControl, family: str
) -> None:
    """In three calls, logits are those of the masked model in one (fp32, 1e-5); caches hold executed tokens."""
    model = tiny(family)
    attention = [unit.name for unit in match_units(model.graph).units if unit.kind == "attention"]
    control.reduced = frozenset(attention[:1])
    masks = MaskSkippedKeys(control.reduced, lambda unit: StoredKeys(unit.name, control))
    PassManager([*insertions, masks]).run(model.graph)
    ids, tape = model.ids(3, 9), {}
    with control.using(tape=tape):
        model.run(ids)
        model.graph.get_parameter(f"{attention[0]}_router.2.bias")[0] -= tape[attention[0]].difference.median() + 1e-3
        expected = model.run(ids)[0]
    execute = tape[attention[0]].execute
    assert 0 < execute.float().mean() < 1
    PassManager([*BEFORE, LowerToCompaction()]).run(model.graph)
    past, slots, found = model.no_past(3), torch.zeros(3, 0, dtype=torch.int64), []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        positions, mask = torch.arange(start, end).expand(3, -1), torch.ones(3, end, dtype=torch.int64)
        logits, *past, slots = model.graph(ids[:, start:end], mask, positions, *past, slots)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-5)
    assert past[0].shape[2] == slots.shape[1]
    for row in range(3):
        assert slots[row][slots[row] >= 0].tolist() == execute[row].nonzero()[:, 0].tolist()


def test_golden_layer_and_attention(tiny: Callable, insertions: tuple, golden: Callable[[str], str]) -> None:
    graph = tiny().graph
    PassManager([*insertions, *BEFORE, LowerToCompaction()]).run(graph)
    layer, attention = "model.layers.1", "model.layers.1.self_attn"
    assert print_graph(graph.get_submodule(layer).graph) + "\n" == golden("lowered_layer")
    assert print_graph(graph.get_submodule(attention).graph) + "\n" == golden("lowered_attention")


def test_second_run_changes_nothing(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager([*insertions, *BEFORE, LowerToCompaction()]).run(graph)
    text = print_model(graph)
    assert not PassManager([*BEFORE, LowerToCompaction()]).run(graph).modified
    assert print_model(graph) == text


def test_a_plain_model_is_left_alone(tiny: Callable) -> None:
    graph = tiny().graph
    PassManager(BEFORE).run(graph)
    assert not PassManager([LowerToCompaction()]).run(graph).modified


def test_attention_has_to_be_raised_first(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager([*insertions, HardenRouters()]).run(graph)
    with pytest.raises(PassError, match="expected a raised attention unit; run RaiseAttention first"):
        PassManager([LowerToCompaction()]).run(graph)


def test_queries_that_mix_tokens_are_refused_by_name(tiny: Callable, insertions: tuple) -> None:
    graph = tiny().graph
    PassManager([*insertions, *BEFORE]).run(graph)
    inner = graph.get_submodule("model.layers.0.self_attn").graph
    linear = next(node for node in inner.nodes if node.target == "q_proj")
    with inner.inserting_after(linear):
        mixed = inner.call_function(aten.flip.default, (linear, [1]), name="mixed")
    linear.replace_all_uses_with(mixed, lambda user: user is not mixed)
    with pytest.raises(PassError) as caught:
        LowerToCompaction().call(graph)
    assert str(caught.value) == (
        "model.layers.0.self_attn, node %mixed: queries go through aten.flip.default, which may mix tokens; "
        "only linears, norms and rotation may stand before the scores"
    )
