"""Quantized exports: blocks hold what they say, and every form of the graph computes with them as PyTorch does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import LlamaConfig

from exporters.onnx_format import Quantization
from exporters.onnx_quantize import PACKED, dequantize, quantize

SHAPE: dict[str, Any] = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 256},
}
CASES = [
    {"batch": batch, "length": length, "past": past, "padding": padding, "gates": gates, "seed": seed}
    for batch, length, past, padding in ((1, 9, 0, "none"), (1, 1, 7, "none"), (3, 6, 2, "left"), (2, 5, 3, "right"))
    for gates in ("mixed", "all executed", "all skipped")
    for seed in (0, 1)
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [96, 40])
def test_the_operator_computes_with_the_numbers_that_we_read_off(
    bits: int, block_size: int, symmetric: bool, width: int
) -> None:
    how, generator = Quantization(bits, block_size, symmetric, 0), np.random.default_rng(0)
    weight = generator.standard_normal((24, width)).astype(np.float32)
    blocks = quantize(weight, how)
    stands_for = dequantize(blocks, width, how)
    steps = (weight.max() - weight.min()) / (2**bits - 1)
    assert np.abs(stands_for - weight).max() <= steps
    parts = {"b": blocks.packed, "s": blocks.scales} | ({} if blocks.zeros is None else {"z": blocks.zeros})
    node = helper.make_node(
        "MatMulNBits", ["x", *parts], ["y"], domain="com.microsoft", K=width, N=24, bits=bits, block_size=block_size
    )
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, n]) for name, n in (("x", width), ("y", 24))]
    graph = helper.make_graph(
        [node], "g", ends[:1], ends[1:], [numpy_helper.from_array(d, n) for n, d in parts.items()]
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    session = ort.InferenceSession(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())
    for rows in (0, 1, 5):
        x = generator.standard_normal((rows, width)).astype(np.float32)
        np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ stands_for.T, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        (Quantization(4, 32, False, 0), {}),
        (Quantization(4, 16, True, 0), {"tie_word_embeddings": True}),
        (Quantization(8, 32, False, 0), {"tie_word_embeddings": True}),
        (Quantization(4, 64, False, 0), {"tie_word_embeddings": True}),  # blocks longer than the width
        (Quantization(8, 16, True, 0), {"attention_bias": True, "mlp_bias": True}),
        (Quantization(4, 128, False, 0), {}),
    ],
    ids=["int4", "int4-symmetric-tied", "int8-tied", "int4-long-tied", "int8-symmetric-biased", "int4-long"],
)
def test_every_form_of_rows(
    how: Quantization, changes: dict[str, Any], tiny_of: Callable, make_pair: Callable, compare: Callable
) -> None:
    """Zero executed rows, one row, ragged rows of a batch, and all of them."""
    pair = make_pair(tiny_of(LlamaConfig(**SHAPE | changes)), quantization=how)
    assert sum(compare(pair, case) for case in CASES) >= 20
    operators = Counter(node.op_type for node in onnx.load(str(pair.path)).graph.node)
    assert operators["MatMulNBits"] == 2 * 7 + 1
    assert (operators["GatherBlockQuantized"], operators["Gather"], operators["Gemm"]) == (1, 0, 0)


@pytest.mark.parametrize("routed", [True, False])
def test_for_cuda_products_stay_on_blocks(
    routed: bool, tiny_of: Callable, make_pair: Callable, compare: Callable
) -> None:
    """RoutedMatMul and RoutedGate read no blocks."""
    how = Quantization(4, 32, False, 0)
    pair = make_pair(tiny_of(LlamaConfig(**SHAPE)), routed=routed, provider="cuda", quantization=how)
    operators = Counter(node.op_type for node in onnx.load(str(pair.path)).graph.node)
    assert (operators["MatMulNBits"], operators["RoutedMatMul"], operators["RoutedGate"]) == (15, 0, 0)
    assert compare(pair, CASES[0])


def test_routers_and_forecasters_keep_their_weights(tiny_of: Callable, make_pair: Callable) -> None:
    pair = make_pair(tiny_of(LlamaConfig(**SHAPE)), quantization=Quantization(4, 16))
    blocks = [t.name for t in onnx.load(str(pair.path)).graph.initializer if t.name.endswith(PACKED)]
    assert blocks
    assert not any("_router" in name or "_forecaster" in name for name in blocks)


def test_fp16_activations(tiny_of: Callable) -> None:
    """Scales take the type of the activations, as the operator wants them."""
    weight = torch.randn(8, 32).half().numpy()
    blocks = quantize(weight, Quantization(4, 16, False))
    assert blocks.scales.dtype == np.float16
    assert np.abs(dequantize(blocks, 32, Quantization(4, 16)) - weight).max() < 0.5
