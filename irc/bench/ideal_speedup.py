"""Computes the largest possible speed-up: by FLOPs for a prefill, by bytes read for a step of decoding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from irc.bench.precision import Precision
from irc.model.flops import flops_ratio, head_flops, unit_flops
from irc.model.routed import RoutedForCausalLM


def dense_flops(model: RoutedForCausalLM, batch: int, tokens: int) -> float:
    """Return the FLOPs of the dense model for a prefill of [batch, tokens]."""
    units = sum(count.dense for count in unit_flops(model, tokens).values())
    return batch * tokens * (head_flops(model) + units)


def dense_bytes(model: RoutedForCausalLM, batch: int, past: float, precision: Precision) -> float:
    """Return the bytes of weights and cache that the dense model reads in one step of decoding.

    Args:
        model: Plain or rewritten.
        batch: Sequences.
        past: Mean number of tokens in the cache.
        precision: Of weights and cache.
    """
    weights = head_flops(model) / 2 + sum((c.always + c.gated) / 2 for c in unit_flops(model, 0).values())
    layers = sum(unit.kind == "attention" for unit in model.units)
    return precision.weight_bytes * weights + precision.bytes * layers * _cache_numbers(model, past) * batch


def _cache_numbers(model: RoutedForCausalLM, past: float) -> float:
    """Return how many numbers the cache of one layer and one sequence holds in a step."""
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers: float = 2.0 * (past + 1) * config.num_key_value_heads * head_size
    return numbers


def ideal_prefill_speedup(model: RoutedForCausalLM, execute: NDArray[np.bool_]) -> float:
    """Return the FLOPs of the dense model over those of the routed model, for a prefill.

    Args:
        model: Rewritten model.
        execute: What is executed, bool [units, batch, tokens].
    """
    keep = {unit.name: float(execute[index].mean()) for index, unit in enumerate(model.units)}
    return 1 / flops_ratio(model, keep, execute.shape[2])


def ideal_decode_speedup(
    model: RoutedForCausalLM, execute: NDArray[np.bool_], past: float, precision: Precision
) -> float:
    """Return the bytes that the dense model reads over those that the routed model reads, for steps of decoding.

    Each step reads one token per sequence. Weights are read once for all sequences if any of them executes the unit; a
    cache is read only by its own sequence. The FLOPs of a linear for one token are twice its weights, so
    `irc.model.flops` counts the weights.

    Args:
        model: Rewritten model.
        execute: What is executed, bool [steps, units, batch].
        past: Mean number of tokens in the cache.
        precision: Of weights, cache, routers and forecasters.
    """
    batch = execute.shape[2]
    cache = _cache_numbers(model, past) * batch
    weights, others = head_flops(model) / 2, 0.0
    counts = unit_flops(model, 0)
    for index, unit in enumerate(model.units):
        count, executed = counts[unit.name], execute[:, index]
        any_executes = float(executed.any(-1).mean())
        any_skips = float((~executed).any(-1).mean())
        weights += (count.always + count.gated * any_executes) / 2
        others += (count.router + count.forecaster * any_skips) / 2
        if unit.kind == "attention":
            others += cache * float(executed.mean())
    return dense_bytes(model, batch, past, precision) / (precision.weight_bytes * weights + precision.bytes * others)
