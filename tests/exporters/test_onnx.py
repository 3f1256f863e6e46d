"""The exported model equals the hardened PyTorch module, over shapes, padding, gates and architectures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

_pairs: dict[Any, Any] = {}

configurations = st.builds(
    lambda heads, groups, size, layers, tied, biased: {
        "vocab_size": 61,
        "hidden_size": heads * groups * size,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": heads * groups,
        "num_key_value_heads": heads,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "attention_bias": biased,
    },
    heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    size=st.sampled_from([8, 16]),
    layers=st.integers(1, 2),
    tied=st.booleans(),
    biased=st.booleans(),
)
inputs = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 4),
        "length": st.one_of(st.just(1), st.integers(2, 128)),
        "past": st.one_of(st.just(0), st.integers(1, 64)),
        "padding": st.sampled_from(["none", "left", "right"]),
        "gates": st.sampled_from(["mixed", "mixed", "all executed", "all skipped"]),
        "seed": st.integers(0, 1000),
    }
)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shape=configurations, data=st.data())
def test_random_llamas(
    tiny_of: Callable, make_pair: Callable, compare: Callable, shape: dict[str, Any], data: st.DataObject
) -> None:
    key = tuple(sorted(shape.items()))
    if key not in _pairs:
        _pairs[key] = make_pair(tiny_of(LlamaConfig(**shape)))
    for _ in range(12):
        assume(compare(_pairs[key], data.draw(inputs)))


@pytest.mark.parametrize("family", ["llama-mha-biased-rope3", "mistral-sliding", "qwen2", "qwen3"])
def test_other_architectures(tiny: Callable, make_pair: Callable, compare: Callable, family: str) -> None:
    pair = make_pair(tiny(family))
    compared = 0
    for seed in range(8):
        for gates, batch, length, past, padding in (
            ("mixed", 2, 9, 0, "left"),
            ("mixed", 1, 1, 7, "none"),
            ("all skipped", 3, 1, 4, "none"),
            ("all executed", 2, 5, 3, "right"),
        ):
            case = {"batch": batch, "length": length, "past": past, "padding": padding, "gates": gates, "seed": seed}
            compared += compare(pair, case)
    assert compared >= 24


@pytest.fixture(scope="module")
def routed(tiny_of: Callable, make_pair: Callable) -> Any:
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "tie_word_embeddings": True}
    return make_pair(tiny_of(LlamaConfig(**shape, **heads, max_position_embeddings=256)))


def test_routers_of_the_bottleneck_share_its_weight(tiny: Callable, make_pair: Callable, compare: Callable) -> None:
    """Router and forecast read one weight, which is stored once."""
    pair = make_pair(tiny(), bottleneck=True)
    names = [tensor.name for tensor in onnx.load(str(pair.path), load_external_data=False).graph.initializer]
    assert sum(name.endswith("_forecaster.down.weight") for name in names) == len(pair.decisions) == 4
    case = {"batch": 2, "length": 6, "past": 3, "padding": "left", "gates": "mixed"}
    assert sum(compare(pair, {**case, "seed": seed}) for seed in range(6)) >= 3


def test_of_our_operators_a_dense_model_has_attention_alone(
    tiny: Callable, make_pair: Callable, compare: Callable
) -> None:
    pair = make_pair(tiny(), routed=False)
    assert pair.decisions == []
    model = onnx.load(str(pair.path))
    assert Counter(node.op_type for node in model.graph.node if node.domain) == {"RoutedAttention": 2}
    assert "Attention" not in {node.op_type for node in model.graph.node}
    assert {entry.key: entry.value for entry in model.metadata_props}["irc.cache_in_place"] == "true"
    case = {"batch": 2, "length": 6, "past": 3, "padding": "left", "gates": "mixed", "seed": 0}
    assert compare(pair, case)


def test_operators_and_weights_of_the_file(routed: Any) -> None:
    model = onnx.load(str(routed.path), load_external_data=False)
    found = Counter(node.op_type for node in model.graph.node)
    assert found["RoutedAttention"] == 2
    assert found["DecideRows"] == 4, "one of each unit gives executed and skipped tokens"
    assert found["ScatterAdd"] == 4
    assert found["SelectRows"] == found["Less"] == found["Not"] == 0
    assert found["Router"] == found["ForecastAdd"] == 4
    assert found["RMSNormalization"] == 5
    assert found["RotaryEmbedding"] == 4
    assert found["Where"] == 1, "one mask for all layers"
    assert found["Transpose"] == 0, "weights lie as MatMul reads them"
    assert sorted(function.name for function in model.functions) == [
        "Compact",
        "DecideRows",
        "ForecastAdd",
        "RaggedPlaces",
        "RoutedAttention",
        "Router",
        "ScatterAdd",
        "SelectRows",
    ]
    embeddings = [t for t in model.graph.initializer if tuple(t.dims) in ((61, 32), (32, 61))]
    assert len(embeddings) == 1, "a tied embedding is stored once"
    assert sorted(path.name for path in routed.path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["irc.op_version"] == "1"
    assert properties["made.by"] == "tests"


def test_the_checker_and_strict_shape_inference_pass(routed: Any) -> None:
    onnx.checker.check_model(str(routed.path), full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(str(routed.path)), check_type=True, strict_mode=True)
    logits = inferred.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in logits] == ["batch_size", "logit_tokens", 61]


@pytest.mark.slow
def test_half_precision(tiny: Callable, make_pair: Callable, feeds: Callable) -> None:
    """fp16 on the CPU provider against PyTorch in fp16: 2e-2 absolute on logits of about 3."""
    pair = make_pair(tiny("llama", torch.float16))
    case = {"batch": 2, "length": 6, "past": 3, "padding": "left", "gates": "all executed", "seed": 0}
    for gates in ("all executed", "all skipped"):
        ids, mask, past = feeds(pair, case, torch.float16)
        expected, _ = pair.torch(gates, ids, mask, past)
        for ops in pair.all_ops:
            found = pair.onnx(gates, ids, mask, past, ops=ops)["logits"]
            assert found.dtype == torch.float16
            real = mask[:, -ids.shape[1] :].bool()
            assert (found.float() - expected[0].float())[real].abs().max() <= 2e-2


def test_bf16_is_written(tiny: Callable, make_pair: Callable) -> None:
    pair = make_pair(tiny("llama", torch.bfloat16))
    model = onnx.load(str(pair.path), load_external_data=False)
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]}
    assert kinds["past_key_values.0.key"] == kinds["logits"] == onnx.TensorProto.BFLOAT16
    onnx.checker.check_model(str(pair.path), full_check=True)
