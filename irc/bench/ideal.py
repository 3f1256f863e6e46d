"""What skipping can gain at most: by FLOPs in a prefill, by the bytes that are read in a step of decoding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from irc.flops import flops_ratio, head_flops, unit_flops
from irc.routed import RoutedForCausalLM


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

    A linear's FLOPs for one token are twice its weights, so weights are counted by `irc.flops`. They are read once for
    all sequences, if one of them executes; a cache by its own sequence alone.

    Args:
        model: Rewritten model.
        execute: [steps, units, batch].
        past: Mean tokens in the cache.
    """
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch = execute.shape[2]
    cache = 2.0 * (past + 1) * config.num_key_value_heads * size * batch
    dense = routed = head_flops(model) / 2
    counts = unit_flops(model, 0)
    for index, unit in enumerate(model.units):
        count, mine = counts[unit.name], execute[:, index]
        attention = cache if unit.kind == "attention" else 0.0
        dense += (count.always + count.gated) / 2 + attention
        runs, skips = float(mine.any(-1).mean()), float((~mine).any(-1).mean())
        routed += (count.always + count.router + count.forecaster * skips + count.gated * runs) / 2
        routed += attention * float(mine.mean())
    return dense / routed
