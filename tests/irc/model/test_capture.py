"""Captured models against eager ones: logits, cache, padding, weights.

Tolerances: exact (0) where both run the same kernels. Eager packs the query heads of a single token with
grouped key/value heads under a mask, which rounds differently: 5e-6 in fp32 there, 2^-5 in bf16 (logits are
around 4, so this is some ten units in the last place).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

from irc.model.cache import CACHE_NAME, cache_shape
from irc.model.capture import assign_weights, capture

ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 2**-5}


def mask_of(batch: int, length: int, padding: str) -> torch.Tensor:
    """The first row has up to two padded places on the side asked for; the others have none."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    places = min(2, length - 1)
    if padding == "left":
        mask[0, :places] = 0
    elif padding == "right":
        mask[0, length - places :] = 0
    return mask


def compare_with_eager(
    model: Any, batch: int, past: int, length: int, padding: str = "none", cache: DynamicCache | None = None
) -> None:
    """Feed `past` tokens, then `length` more, through both models; compare logits and cache of both calls."""
    ids = model.ids(batch, past + length, seed=past + length)
    mask = mask_of(batch, past + length, padding)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config) if cache is None else cache
    grouped = model.config.num_key_value_heads < model.config.num_attention_heads
    present = model.no_past(batch)
    with torch.no_grad():
        for start, stop in ((0, past), (past, past + length)):
            if start == stop:
                continue
            step, seen, at = ids[:, start:stop], mask[:, :stop], positions[:, start:stop]
            eager = model.eager(
                input_ids=step, attention_mask=seen, position_ids=at, use_cache=True, **{CACHE_NAME: cache}
            )
            logits, *present = model.graph(step, seen, at, *present)
            packed = grouped and stop - start == 1
            atol = ROUNDING[logits.dtype] if packed else 0.0
            torch.testing.assert_close(logits, eager.logits, rtol=0, atol=atol)
            kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
            for got, expected in zip(present, kept, strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("length", range(1, 10))
def test_logits_and_cache_without_past(tiny: Callable, batch: int, length: int) -> None:
    compare_with_eager(tiny(), batch, 0, length)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("past", "length"), [(0, 5), (1, 1), (1, 4), (6, 1), (6, 3)])
@pytest.mark.parametrize("family", ["llama", "llama-mha-biased-rope3", "mistral", "qwen2", "qwen3"])
def test_past_and_padding(tiny: Callable, family: str, past: int, length: int, padding: str) -> None:
    compare_with_eager(tiny(family), 2, past, length, padding)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("past", "length"), [(0, 1), (0, 9), (5, 1), (4, 3)])
def test_bf16(tiny: Callable, past: int, length: int, padding: str) -> None:
    compare_with_eager(tiny("llama", torch.bfloat16), 3, past, length, padding)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("past", "length"), [(0, 9), (7, 1), (7, 5)])
def test_sliding_window_equals_eager_that_keeps_its_whole_past(
    tiny: Callable, past: int, length: int, padding: str
) -> None:
    compare_with_eager(tiny("mistral-sliding"), 2, past, length, padding, cache=DynamicCache())


@torch.no_grad()
def test_sliding_window_is_obeyed(tiny: Callable) -> None:
    """With a window of 4 and 2 layers, the seventh token on is blind to the first; without a window it is not."""
    for family, blind in (("mistral-sliding", True), ("mistral", False)):
        model = tiny(family)
        ids = model.ids(1, 9)
        other = ids.clone()
        other[0, 0] = (ids[0, 0] + 1) % model.config.vocab_size
        before, after = model.run(ids)[0], model.run(other)[0]
        assert not torch.equal(before[:, 6], after[:, 6])
        assert torch.equal(before[:, 7:], after[:, 7:]) is blind


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    groups=st.sampled_from([1, 2]),
    kv_heads=st.sampled_from([1, 2, 3]),
    head_size=st.sampled_from([None, 2, 6]),
    layers=st.integers(1, 2),
    intermediate=st.integers(1, 40),
    tied=st.booleans(),
    biases=st.booleans(),
    batch=st.integers(1, 3),
    past=st.integers(0, 6),
    length=st.integers(1, 9),
    padding=st.sampled_from(["none", "left", "right"]),
)
def test_random_llamas(
    tiny_of: Callable,
    groups: int,
    kv_heads: int,
    head_size: int | None,
    layers: int,
    intermediate: int,
    tied: bool,
    biases: bool,
    batch: int,
    past: int,
    length: int,
    padding: str,
) -> None:
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=4 * groups * kv_heads,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        tie_word_embeddings=tied,
        attention_bias=biases,
        mlp_bias=biases,
        initializer_range=0.3,
    )
    compare_with_eager(tiny_of(config), batch, past, length, padding)


@torch.no_grad()
def test_the_mask_matters(tiny: Callable) -> None:
    """Guards the tests above: logits do depend on padding and on positions."""
    model = tiny()
    ids = model.ids(1, 5)
    mask, padded = torch.ones_like(ids), mask_of(1, 5, "left")
    positions = torch.arange(5)[None]
    plain = model.graph(ids, mask, positions, *model.no_past(1))[0]
    assert not torch.equal(plain, model.graph(ids, padded, positions, *model.no_past(1))[0])
    assert not torch.equal(plain, model.graph(ids, mask, positions.flip(-1), *model.no_past(1))[0])


def test_capture_touches_no_memory_and_keeps_grad_mode() -> None:
    huge = LlamaConfig(
        vocab_size=50_000, hidden_size=65_536, intermediate_size=65_536, num_hidden_layers=1, num_attention_heads=512
    )
    with torch.enable_grad():
        captured = capture(huge, torch.bfloat16)
        assert torch.is_grad_enabled()
    with torch.no_grad():
        assert not torch.is_grad_enabled()
    assert {parameter.device.type for parameter in captured.graph.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in captured.graph.parameters()} == {torch.bfloat16}


def test_cache_shape_follows_head_dim(tiny: Callable) -> None:
    assert cache_shape(tiny("qwen3").config) == (2, 2, 16)
    assert cache_shape(tiny("llama").config) == (2, 2, 8)


def test_a_second_device_assignment_needs_no_second_capture(tiny: Callable) -> None:
    """Weights may be assigned again, for instance those of another checkpoint."""
    model = tiny()
    state = {name: weight + 1 for name, weight in model.eager.state_dict().items()}
    assign_weights(model.captured, state)
    model.eager.load_state_dict(state)
    compare_with_eager(model, 1, 0, 4)
