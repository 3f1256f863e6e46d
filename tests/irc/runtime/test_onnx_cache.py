"""Caches of ONNX Runtime's memory: what they hold is kept where their memory grows, in every type."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from exporters.onnx_dtypes import of_weights
from irc.runtime.cache import CacheLayout, PlacedCache, lengthen
from irc.runtime.session import _float32

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PAST, PRESENT = ("past.key", "past.value"), ("present.key", "present.value")


def _view(value: Any) -> torch.Tensor:
    """Return ONNX Runtime's memory as PyTorch sees it; numpy has no bf16."""
    return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())


def _session(dtype: str) -> Any:
    """A model that hands its cache on; past and present may be one memory."""
    values = [onnx.helper.make_tensor_value_info(name, of_weights(dtype).code, [None] * 4) for name in PAST + PRESENT]
    nodes = [onnx.helper.make_node("Identity", [past], [present]) for past, present in zip(PAST, PRESENT, strict=True)]
    graph = onnx.helper.make_graph(nodes, "hand on", values[:2], values[2:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_that_grows_keeps_what_it_holds(dtype: str, batch: int) -> None:
    session = _session(dtype)
    cache = PlacedCache(CacheLayout(PAST, PRESENT, 1, 2, 4, dtype, "cpu"), batch)
    written: list[torch.Tensor] = []
    for tokens in (3, 1, 100, 500):
        session.run_with_iobinding(cache.bind(session, [], tokens))
        assert cache.places > cache.length + tokens, "a full cache could not be told from one that grows"
        parts = [torch.randn(batch, 2, tokens, 4).to(DTYPES[dtype]) for _ in PAST]
        for value, part in zip(cache.values, parts, strict=True):
            _view(value)[:, :, cache.length : cache.length + tokens] = part
        cache.advance([], tokens)
        written = [torch.cat(pair, 2) for pair in zip(written, parts, strict=True)] if written else parts
        for value, whole in zip(cache.values, written, strict=True):
            assert value.shape() == [batch, 2, cache.places, 4]
            assert torch.equal(_view(value)[:, :, : cache.length], whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengthening_goes_by_no_host_copy(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU `numpy()` copies to the host, and what is written there is lost; of bf16 there is none."""
    make = ort.OrtValue.ortvalue_from_shape_and_type
    old, new = (make([2, 3, places, 8], of_weights(dtype).code, "cpu") for places in (5, 9))
    _view(old)[:] = torch.arange(240).reshape(2, 3, 5, 8)
    monkeypatch.setattr(ort.OrtValue, "numpy", None)
    lengthen([old], [new], dtype, "cpu")
    assert torch.equal(_view(new)[:, :, :5], _view(old))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_every_type_are_brought_to_the_host_as_float32(dtype: str) -> None:
    """NumPy has no bf16."""
    value = ort.OrtValue.ortvalue_from_shape_and_type([2, 3, 5], of_weights(dtype).code, "cpu")
    _view(value)[:] = torch.randn(2, 3, 5)
    found = _float32(value)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, _view(value).float().numpy())
