"""What skipping can gain at most: by FLOPs in a prefill, by the bytes that are read in a step of decoding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from irc.dtypes import BYTES
from irc.model.flops import flops_ratio, head_flops, unit_flops
from irc.model.routed import RoutedForCausalLM


def dense_flops(model: RoutedForCausalLM, batch: int, tokens: int) -> float:
    """Return the FLOPs of the dense model's prefill of [batch, tokens]."""
    units = sum(count.dense for count in unit_flops(model, tokens).values())
    return batch * tokens * (head_flops(model) + units)


def dense_bytes(model: RoutedForCausalLM, batch: int, past: float, dtype: str) -> float:
    """Return the bytes, weights and cache, that one step of the dense model's decoding reads.

    Args:
        model: Plain or rewritten.
        batch: Sequences.
        past: Mean tokens in the cache.
        dtype: fp32, fp16 or bf16.
    """
    return BYTES[dtype] * _dense_reads(model, batch, past)


def _dense_reads(model: RoutedForCausalLM, batch: int, past: float) -> float:
    """Return the numbers, weights and cache, that one step of the dense model's decoding reads."""
    weights = head_flops(model) / 2 + sum((c.always + c.gated) / 2 for c in unit_flops(model, 0).values())
    layers = sum(unit.kind == "attention" for unit in model.units)
    return weights + layers * _cache(model, past) * batch


def _cache(model: RoutedForCausalLM, past: float) -> float:
    """Return the numbers that one layer's cache of one sequence holds in a step."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers: float = 2.0 * (past + 1) * config.num_key_value_heads * size
    return numbers


def ideal_prefill(model: RoutedForCausalLM, execute: NDArray[np.bool_]) -> float:
    """Return dense over routed FLOPs of a prefill.

    Args:
        model: Rewritten model.
        execute: [units, batch, tokens].
    """
    keep = {unit.name: float(execute[index].mean()) for index, unit in enumerate(model.units)}
    return 1 / flops_ratio(model, keep, execute.shape[2])


def ideal_decode(model: RoutedForCausalLM, execute: NDArray[np.bool_], past: float) -> float:
    """Return dense over routed bytes, weights and cache, that steps of one token a sequence read.

    A linear's FLOPs for one token are twice its weights, so weights are counted by `irc.model.flops`. They are read
    once for all sequences, if one of them executes; a cache by its own sequence alone.

    Args:
        model: Rewritten model.
        execute: [steps, units, batch].
        past: Mean tokens in the cache.
    """
    cache = _cache(model, past) * execute.shape[2]
    routed = head_flops(model) / 2
    counts = unit_flops(model, 0)
    for index, unit in enumerate(model.units):
        count, mine = counts[unit.name], execute[:, index]
        attention = cache if unit.kind == "attention" else 0.0
        runs, skips = float(mine.any(-1).mean()), float((~mine).any(-1).mean())
        routed += (count.always + count.router + count.forecaster * skips + count.gated * runs) / 2
        routed += attention * float(mine.mean())
    return _dense_reads(model, execute.shape[2], past) / routed
