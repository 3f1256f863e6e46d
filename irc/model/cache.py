"""Converts the key/value cache between transformers' classes and the flat tensors of a captured graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

_FIELDS = {entry.name for entry in dataclasses.fields(CausalLMOutputWithPast)}

CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"
"""The name of the cache in models and their outputs: `cache` since transformers 5.24, `past_key_values` before."""


def cache_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return (layers, key/value heads, head size) of a model's cache."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, size


def flat_past(
    config: PretrainedConfig, cache: Cache | None, batch: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Return k0, v0, k1, v1, ..., each [batch, heads, past, size]; past is 0 without a cache."""
    layers, heads, size = cache_shape(config)
    if cache is None or cache.get_seq_length() == 0:
        empty = torch.zeros(batch, heads, 0, size, dtype=dtype, device=device)
        return [empty] * (2 * layers)
    stored: list[Any] = list(cache.layers)
    return [tensor for layer in stored for tensor in (layer.keys, layer.values)]


def updated(cache: Cache | None, present: list[torch.Tensor]) -> Cache:
    """Return a cache with the keys and values that the graph returned: the given one, unless its layers drop tokens."""
    if cache is None or any(type(layer) is not DynamicLayer for layer in cache.layers):
        # The captured graph keeps the whole past of sliding layers too, which only plain layers can hold.
        cache = DynamicCache()
    for index, (keys, values) in enumerate(zip(present[::2], present[1::2], strict=True)):
        if len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        layer: Any = cache.layers[index]
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache
