"""The inspection of a tiny model, compared with arithmetic done by hand, and its graphs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from irc.bundle.contents import bundle_of
from irc.bundle.layout import METRICS
from irc.bundle.loading import load, open_model
from irc.bundle.saving import save_bundle
from irc.bundle.source import ModelSource
from irc.errors import InputError
from irc.model.build import build_plain, build_routed
from irc.model.checkpoint import BaseModel
from irc.model.flops import flops_ratio
from irc.model.routed import RoutedForCausalLM, RoutingSpec
from irc.views.inspection import inspection, layer_diff, layer_graph, why

# The fixture's Llama: d 32, FFN 48, 4 heads of 8 (2 for keys and values), vocabulary 61, 2 layers, tied head.
RANK, HIDDEN, SEQ_LEN = 3, 8, 16
ATTENTION, FFN = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48
FORECASTER, ROUTER = 2 * 32 * RANK, 32 * HIDDEN + HIDDEN * 2
FORECASTER_BIAS, ROUTER_BIAS = RANK + 32, HIDDEN + 2
KEEP = {"0.self_attn": 0.25, "0.mlp": 1.0, "1.self_attn": 0.5, "1.mlp": 0.75}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_of: Callable[..., Any]) -> BaseModel:
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("base")
    tiny_of(config).eager.save_pretrained(folder)
    return BaseModel(str(folder), folder)


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    units = {f"model.layers.{name}": {"keep_ratio": keep, "recoverability": keep / 2} for name, keep in KEEP.items()}
    sparsity = {"target": 0.4, "realized": 0.375, "attention": 0.625, "ffn": 0.125}
    data = {"name": "text", "fingerprint": "0", "seq_len": SEQ_LEN}
    return {"units": units, "sparsity": sparsity, "data": data}


@pytest.fixture(scope="module")
def bundle(base: BaseModel, metrics: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RoutedForCausalLM:
    model = build_routed(base, RoutingSpec(RANK))
    keep = {name: unit["keep_ratio"] for name, unit in metrics["units"].items()}
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    save_bundle(model, folder, metrics | {"flops_ratio": flops_ratio(model, keep, SEQ_LEN)})
    return open_model(ModelSource(str(folder), device="cpu"))


@pytest.fixture(scope="module")
def facts(bundle: RoutedForCausalLM) -> dict[str, Any]:
    return inspection(bundle, "bundle")


@pytest.fixture(scope="module")
def plain(base: BaseModel) -> RoutedForCausalLM:
    return build_plain(base)


def test_parameters_are_those_counted_by_hand(facts: dict[str, Any]) -> None:
    base = 61 * 32 + 32 + 2 * (ATTENTION + FFN + 2 * 32)  # the tied head counts once
    inserted = 4 * (FORECASTER + FORECASTER_BIAS + ROUTER + ROUTER_BIAS)
    assert facts["parameters"] == {"base": base, "inserted": inserted}
    assert facts["units"][0]["parameters"] == {
        "unit": ATTENTION,
        "forecaster": FORECASTER + FORECASTER_BIAS,
        "router": ROUTER + ROUTER_BIAS,
        "mux": 0,
    }


def test_flops_are_those_summed_by_hand(facts: dict[str, Any]) -> None:
    scores = 4 * 8.5 * 32  # each of 16 tokens sees 8.5 on average; q.k and the weighted sum
    always = 2 * (32 * 16 * 2)
    router, forecaster = 2 * ROUTER, 2 * FORECASTER
    attention, ffn, head = 2 * ATTENTION + scores, 2 * FFN, 2 * 32 * 61
    expected = {
        "0.self_attn": always + router + forecaster * 0.75 + (attention - always) * 0.25,
        "0.mlp": router + ffn,
        "1.self_attn": always + router + forecaster * 0.5 + (attention - always) * 0.5,
        "1.mlp": router + forecaster * 0.25 + ffn * 0.75,
    }
    for unit, (name, routed) in zip(facts["units"], expected.items(), strict=True):
        assert unit["name"] == f"model.layers.{name}"
        assert unit["flops"]["dense"] == (attention if unit["kind"] == "attention" else ffn)
        assert unit["flops"]["routed"] == pytest.approx(routed, rel=1e-12)
    dense, routed = 2 * (attention + ffn) + head, sum(expected.values()) + head
    assert facts["flops"] == pytest.approx({"head": head, "dense": dense, "routed": routed}, rel=1e-12)
    assert facts["flops_ratio"] == pytest.approx(routed / dense, rel=1e-12)


def test_totals_are_those_of_the_metrics(bundle: RoutedForCausalLM, facts: dict[str, Any]) -> None:
    opened = bundle_of(bundle)
    assert opened is not None
    written = json.loads(opened.texts[METRICS])
    assert facts["flops_ratio"] == pytest.approx(written["flops_ratio"], abs=1e-6)
    assert facts["sparsity"] == pytest.approx(written["sparsity"], abs=1e-12)


def test_units_carry_shapes_and_measurements(facts: dict[str, Any]) -> None:
    first = {key: value for key, value in facts["units"][0].items() if key not in ("flops", "parameters")}
    assert first == {
        "name": "model.layers.0.self_attn",
        "kind": "attention",
        "layer": 0,
        "hidden": 32,
        "rank": RANK,
        "router_hidden": HIDDEN,
        "keep_ratio": 0.25,
        "recoverability": 0.125,
    }
    assert facts["layers"] == 2
    assert facts["seq_len"] == SEQ_LEN
    assert facts["refusals"] == []


def test_a_plain_model_has_nothing_inserted(plain: RoutedForCausalLM, facts: dict[str, Any]) -> None:
    said = inspection(plain, "plain")
    assert said.keys() == facts.keys()
    assert said["parameters"] == {"base": facts["parameters"]["base"], "inserted": 0}
    assert said["sparsity"] is None
    assert said["flops_ratio"] == 1.0
    assert said["seq_len"] == 64  # the default cut to the model's context
    for unit in said["units"]:
        assert (unit["rank"], unit["router_hidden"], unit["keep_ratio"]) == (None, None, None)
        assert unit["flops"]["routed"] == unit["flops"]["dense"]
        assert unit["parameters"].keys() == {"unit"}


def test_a_bundle_without_measurements_says_so(base: BaseModel, tmp_path: Path) -> None:
    model = build_routed(base, RoutingSpec(RANK))
    save_bundle(model, tmp_path / "bundle")
    said = inspection(load(tmp_path / "bundle"), "bundle")
    assert (said["sparsity"], said["flops_ratio"], said["flops"]["routed"]) == (None, None, None)
    assert said["units"][0]["keep_ratio"] is None
    assert said["units"][0]["flops"]["dense"] > 0


def test_graph_names_the_inserted_calls(bundle: RoutedForCausalLM, plain: RoutedForCausalLM) -> None:
    text = layer_graph(bundle, 1)
    assert text.startswith("# model.layers.1\n")
    assert text.count(" = call ") == layer_graph(plain, 1).count(" = call ") + 6
    assert "%mlp_mux = call mlp_mux(%mlp, %mlp_forecaster, %mlp_router)" in text


def test_diff_adds_the_insertion_and_rewires_the_adds(bundle: RoutedForCausalLM) -> None:
    lines = layer_diff(bundle, 1).splitlines()
    added = [line[1:] for line in lines[2:] if line.startswith("+")]
    removed = [line[1:] for line in lines[2:] if line.startswith("-")]
    inserted = [line for line in added if " = call " in line]
    names = [f"%{unit}_{role}" for unit in ("self_attn", "mlp") for role in ("forecaster", "router", "mux")]
    assert [line.partition(" = ")[0] for line in inserted] == names
    rewired = [line for line in added if line not in inserted]
    assert len(removed) == len(rewired) == 2
    for before, after, mux in zip(removed, rewired, ("%self_attn_mux", "%mlp_mux"), strict=True):
        old, new = _operands(before), _operands(after)
        assert before.partition("(")[0] == after.partition("(")[0]
        assert " = add.Tensor" in before
        assert new == [old[0], mux]


def _operands(line: str) -> list[str]:
    return line.partition("(")[2].rstrip(")").split(", ")


def test_diff_of_a_plain_model_is_empty(plain: RoutedForCausalLM) -> None:
    assert layer_diff(plain, 0) == ""


def test_diff_shows_a_change_that_is_no_insertion(bundle: RoutedForCausalLM) -> None:
    block = bundle.graph.get_submodule("model.layers.0")
    graph = block.graph
    assert isinstance(graph, fx.Graph)
    add = next(node for node in reversed(graph.nodes) if node.target is torch.ops.aten.add.Tensor)
    args = add.args
    add.args = (args[1], args[0])
    try:
        assert f"+%{add.name} = add.Tensor(%mlp_mux, " in layer_diff(bundle, 0)
    finally:
        add.args = args


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_refused(plain: RoutedForCausalLM, layer: int) -> None:
    for show in (layer_graph, layer_diff):
        with pytest.raises(InputError, match=rf"^layer {layer}: .* 0 to 1$"):
            show(plain, layer)


def test_why_on_matched_and_unknown_names(bundle: RoutedForCausalLM) -> None:
    said = why(bundle, "1.mlp")
    for part in ("model.layers.1.mlp: matched as ffn", "width 32", "mul, silu", "%mlp ", "%add_"):
        assert part in said
    said = why(bundle, "model.layers.0.self_attn")
    for part in ("model.layers.0.self_attn: matched as attention", "width 32", "scaled_dot_product_attention"):
        assert part in said
    for name in ("9.mlp", "lp", ""):
        known = r"model\.layers\.0\.self_attn.* to model\.layers\.1\.mlp"
        with pytest.raises(InputError, match=rf"^{re.escape(name)}: .*{known}$"):
            why(bundle, name)


def test_why_on_a_refused_name(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from passes import row_wise

    monkeypatch.setattr(row_wise, "_ELEMENTWISE", row_wise._ELEMENTWISE - {"silu"})
    refused = build_plain(base)
    assert "silu" in why(refused, "0.mlp")
    assert [refusal["name"] for refusal in inspection(refused, "m")["refusals"]] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]


def test_units_that_are_not_routed_are_logged(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from passes import row_wise

    monkeypatch.setattr(row_wise, "_ELEMENTWISE", row_wise._ELEMENTWISE - {"silu"})
    model = build_routed(base, RoutingSpec(4))
    assert [unit.kind for unit in model.units] == ["attention", "attention"]
    messages = [record.getMessage() for record in caplog.records if record.name == "irc.model.build"]
    assert len(messages) == 1
    assert "2 submodules" in messages[0]
    assert "model.layers.0.mlp: " in messages[0]
