"""Every node, value and weight of an exported model has a name that a person can read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import onnx
import pytest

from exporters.onnx_format import FIRST

NODE = re.compile(
    r"/(model|embed_tokens|rotary_emb|norm|lm_head"
    r"|layers\.\d+(/(input_layernorm|post_attention_layernorm|(self_attn|mlp)(_router|_forecaster)?(/\w+)?))?)/"
)
IN_LAYER = re.compile(r"/layers\.(\d+)/")
CONSTANT = re.compile(r"/constants/(int64|float|bool)/[-\[\]\d.,+e]+(True|False)?$|/constants/bool/(True|False)$")
KINDS = {"routed": {}, "dense": {"routed": False}, "reduced": {"reduced": (1,)}, "cuda": {"provider": "cuda"}}

_exported: dict[str, tuple[onnx.ModelProto, set[str]]] = {}


@pytest.fixture(params=KINDS)
def exported(request: Any, tiny: Callable, make_pair: Callable) -> tuple[onnx.ModelProto, set[str]]:
    """Give a model and the names of the parameters and buffers that its PyTorch model has."""
    if request.param not in _exported:
        pair = make_pair(tiny("qwen3"), **KINDS[request.param])
        model = onnx.load(str(pair.path), load_external_data=False)
        tensors = {name for name, _ in (*pair.reference.named_parameters(), *pair.reference.named_buffers())}
        _exported[request.param] = model, tensors
    return _exported[request.param]


def test_every_node_is_called_after_its_module_and_operator(exported: tuple) -> None:
    names = [node.name for node in exported[0].graph.node]
    assert len(set(names)) == len(names)
    for node in exported[0].graph.node:
        assert NODE.match(node.name), node.name
        assert re.fullmatch(rf"{node.op_type}(_\d+)?", node.name.rpartition("/")[2]), node.name


def test_nodes_of_a_layer_are_called_after_that_layer(exported: tuple) -> None:
    """A node that reads a weight of a layer, or results of one alone, carries the layer's number."""
    model, _ = exported
    for node in model.graph.node:
        read = [name for name in node.input if not name.endswith(".logit_difference")]
        layers = {found for name in read if (found := re.search(r"^model\.layers\.(\d+)\.", name))}
        if layers:
            assert {found[1] for found in layers} == {IN_LAYER.match(node.name)[1]}, node.name
    assert {match[1] for node in model.graph.node if (match := IN_LAYER.match(node.name))} == {"0", "1"}


def test_every_value_is_called_after_its_node(exported: tuple) -> None:
    interface = {value.name for value in (*exported[0].graph.input, *exported[0].graph.output)}
    for node in exported[0].graph.node:
        for index, name in enumerate(node.output):
            if name not in interface and not name.endswith(".logit_difference"):
                assert name == f"{node.name}_output_{index}"


def test_every_weight_is_called_as_in_the_model(exported: tuple) -> None:
    model, tensors = exported
    names = {tensor.name for tensor in model.graph.initializer}
    weights = {name for name in names if not name.startswith("/constants/")} - {FIRST}
    merged = {name for name in weights if name.endswith("_forecaster.bias")}
    assert weights - merged <= tensors
    assert {f"model.layers.{n}.mlp.{part}_proj.weight" for n in (0, 1) for part in ("gate", "up", "down")} <= weights
    for name in names - weights - {FIRST}:
        assert CONSTANT.match(name), name


def test_a_linear_carries_the_path_of_its_module(exported: tuple) -> None:
    found = {node.name: node for node in exported[0].graph.node}
    for name in ("/layers.1/mlp/down_proj", "/layers.0/self_attn/o_proj"):
        product = found.get(f"{name}/MatMul") or found[f"{name}/RoutedMatMul"]
        path = "model." + name.strip("/").replace("/", ".") + ".weight"
        assert path in product.input


def test_bodies_of_functions_have_named_nodes(exported: tuple) -> None:
    for function in exported[0].functions:
        assert all(node.name.startswith(f"{function.name}/{node.op_type}_") for node in function.node)


def test_the_file_says_who_made_it(exported: tuple) -> None:
    model, _ = exported
    assert (model.producer_name, model.producer_version) == ("irc", "1.2.3")
    assert (model.model_version, model.doc_string) == (1, "A tiny model.")


def test_tied_and_fused_weights_are_named_too(tiny: Callable, make_pair: Callable) -> None:
    pair = make_pair(tiny("llama"))
    model = onnx.load(str(pair.path), load_external_data=False)
    names = {tensor.name for tensor in model.graph.initializer}
    assert {name for name in names if not name.startswith(("model.", "/constants/"))} - {FIRST} == {
        "lm_head.weight",
        "lm_head.weight.flat",
        "lm_head.weight.width",
    }
    assert {node.name for node in model.graph.node if node.op_type == "Gemm"} == {"/lm_head/Gemm"}
