"""A pass layer by layer gives the same statistics as one batch by batch, and needs one layer at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from irc.model.build import build_routed
from irc.model.checkpoint import BaseModel
from irc.model.paging import MappedPages, released
from irc.model.routed import RoutedForCausalLM, RoutingSpec
from irc.training.closed_form import UnitStatistics, gather_statistics
from irc.training.layerwise import layer_by_layer, outermost

Make = Callable[..., RoutedForCausalLM]


def test_statistics_are_those_of_batches(make_routed: Make, ids: torch.Tensor) -> None:
    model = make_routed()
    batches = [ids[:3], ids[3:]]
    with torch.no_grad(), model.control.using(mode="execute"):
        with gather_statistics(model) as expected:
            for batch in batches:
                model(input_ids=batch, use_cache=False)
        found: dict[str, UnitStatistics] = {}
        layers, told = [], []
        for units, compute in layer_by_layer(model, batches):
            layers.append({unit.layer for unit in units})
            with gather_statistics(model, units=units) as statistics:
                compute(told.append)
            found |= statistics
    assert layers == [{0}, {1}]
    assert told == [3, 1, 3, 1]
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        for part in ("x", "y", "xx", "xy"):
            assert torch.equal(getattr(found[name], part), getattr(one, part)), (name, part)


def test_only_outermost_blocks_count() -> None:
    assert outermost({"model.layers.1", "model.layers.1.moe", "model.layers.10"}) == [
        "model.layers.1",
        "model.layers.10",
    ]
    assert outermost({"", "model"}) == [""]


@pytest.fixture(params=["file", "link"])
def mapped(request: pytest.FixtureRequest, tmp_path: Path) -> RoutedForCausalLM:
    """A model whose bf16 weights are mapped from disk, from a file or from the target of a link in a hub cache."""
    if not sys.platform.startswith("linux"):
        pytest.skip("elsewhere nothing is released")
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=300, dtype=torch.bfloat16)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    if request.param == "link":
        (tmp_path / "model.safetensors").rename(tmp_path / "0123abcd")
        (tmp_path / "model.safetensors").symlink_to("0123abcd")
    return build_routed(BaseModel("tiny", tmp_path), RoutingSpec(8), "bf16")


def resident(model: RoutedForCausalLM) -> int:
    """Return how many KiB of a model's safetensors file are in the memory of this process."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            counts = line.endswith(str((model.base.folder / "model.safetensors").resolve()))
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_released_weights_leave_memory_and_are_read_again(mapped: RoutedForCausalLM, tmp_path: Path) -> None:
    mapped.base = BaseModel("tiny", tmp_path)
    parameters = list(mapped.graph.parameters())
    before = [parameter.clone() for parameter in parameters]
    pages = MappedPages(parameters, least=0)
    assert pages.bytes() > 0.9 * sum(2 * p.numel() for p in parameters if p.numel() > 4096 and p._version == 0)
    touched = resident(mapped)
    pages.release(parameters)
    assert resident(mapped) < 0.1 * touched
    for parameter, kept in zip(parameters, before, strict=True):
        assert torch.equal(parameter, kept)
    assert resident(mapped) > 0.9 * touched


def test_what_was_written_to_is_never_released(mapped: RoutedForCausalLM) -> None:
    weight = mapped.graph.get_parameter("model.layers.0.mlp.up_proj.weight")
    pages = MappedPages(mapped.graph.parameters(), least=0)
    with torch.no_grad():
        weight.fill_(2.0)
    assert pages.bytes() > 0
    pages.release([weight])
    assert bool((weight == 2.0).all())


def test_blocks_are_released_after_their_call(
    mapped: RoutedForCausalLM, tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped.base = BaseModel("tiny", tmp_path)
    monkeypatch.setattr(MappedPages.__init__, "__defaults__", (0,))
    with torch.no_grad():
        expected = mapped.states(ids)
        touched = resident(mapped)
        with released(mapped.graph, ["model.layers.0", "model.layers.1"]):
            assert torch.equal(mapped.states(ids), expected)
            assert resident(mapped) < 0.3 * touched
        assert torch.equal(mapped.states(ids), expected)
        assert resident(mapped) > 0.9 * touched
