"""Times a routed model against its dense self on ONNX Runtime, in turn in one process, and holds it to its ideal."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irc.bundle import save_bundle
from irc.checkpoint import BaseModel
from irc.errors import InputError
from irc.export import export
from irc.flops import flops_ratio, head_flops, unit_flops
from irc.modules import default_rank
from irc.onnx_cache import Cache
from irc.routed import RoutedForCausalLM, RoutingSpec, build_routed
from irc.runtime import Runtime
from irc.train import ProgressFactory


@dataclass(frozen=True)
class Shape:
    """A Llama to time, with random weights.

    Attributes:
        hidden: Hidden size.
        layers: Decoder layers.
        ffn: Size inside the FFN.
        heads: Attention heads.
        kv_heads: Key/value heads.
        vocab: Vocabulary.
    """

    hidden: int = 1024
    layers: int = 8
    ffn: int = 2816
    heads: int = 16
    kv_heads: int = 16
    vocab: int = 4096


@dataclass(frozen=True)
class Load:
    """What is timed: a prefill of `prefill` tokens, and `decode` steps of one token each after `past` tokens."""

    prefill: int = 512
    past: int = 128
    decode: int = 64
    rounds: int = 7


def bench(
    shape: Shape,
    sparsities: Sequence[float],
    load: Load,
    progress: ProgressFactory,
    provider: str,
    seed: int = 0,
    ops: str = "auto",
) -> dict[str, Any]:
    """Time a random Llama whose gates follow given random masks.

    Every gate of the routed model is drawn with the nominal sparsity; routers run and are counted. Dense and routed
    steps alternate. Decode steps draw new gates for each token.

    Args:
        shape: Of the model.
        sparsities: Nominal, 0 to 1.
        load: What is timed.
        progress: Makes progress bars.
        provider: Of ONNX Runtime.
        seed: Of weights and masks.
        ops: Kernels of our operators in the routed model, as for `Runtime`.

    Returns:
        What `irc bench --json` prints.
    """
    if not sparsities:
        raise InputError("--sparsities is empty; give at least one, such as 0.25")
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads or shape.hidden // shape.heads % 2:
        raise InputError(
            f"hidden {shape.hidden}, heads {shape.heads}, kv_heads {shape.kv_heads}: heads must divide the hidden size "
            "into even parts, and kv_heads must divide heads"
        )
    with tempfile.TemporaryDirectory() as work:
        model, folders = _export_both(shape, Path(work), seed)
        runtimes = {
            name: Runtime(folder, provider, forced=name == "routed", ops=ops) for name, folder in folders.items()
        }
        rows = []
        with progress("bench", len(sparsities)) as bar:
            for done, share in enumerate(sparsities, start=1):
                rows.append(_row(model, runtimes, share, load, seed))
                bar.update(done, sparsity=share)
    routed = runtimes["routed"]
    used = {"provider": routed.provider, "ops": routed.ops}
    return {"shape": vars(shape), "load": vars(load), **used, "results": rows}


def _export_both(shape: Shape, work: Path, seed: int) -> tuple[RoutedForCausalLM, dict[str, Path]]:
    """Write a random Llama and its untrained bundle, and export both in the same way."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(work / "base")
    base = BaseModel(str(work / "base"), work / "base")
    model = build_routed(base, RoutingSpec(default_rank(shape.hidden)), "fp32", seed=seed)
    model.facts["base"] = base
    save_bundle(model, work / "bundle")
    sources = {"dense": "base", "routed": "bundle"}
    for name, source in sources.items():
        export(str(work / source), work / name, dtype="fp32")
    return model, {name: work / name for name in sources}


def _row(model: RoutedForCausalLM, runtimes: dict[str, Runtime], share: float, load: Load, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    units = len(model.units)
    vocabulary = model.config.vocab_size

    def ids(tokens: int) -> NDArray[np.int64]:
        return random.integers(0, vocabulary, (1, tokens))

    prompt, before, token = ids(load.prefill), ids(load.past), ids(1)
    gates = random.random((units, 1, load.prefill)) >= share
    steps = random.random((load.decode, units, 1, 1)) >= share

    def time_prefill() -> dict[str, float]:
        return {name: step(name, prompt, runtime.empty_cache(1), gates) for name, runtime in runtimes.items()}

    def time_decode() -> dict[str, float]:
        """Read a past, then time steps of one token, each after the one before."""
        caches = {name: runtime.empty_cache(1) for name, runtime in runtimes.items()}
        for name, cache in caches.items():
            step(name, before, cache, np.ones((units, 1, load.past), bool))
        seconds = dict.fromkeys(runtimes, 0.0)
        for forced in steps:
            for name, cache in caches.items():
                seconds[name] += step(name, token, cache, forced)
        return seconds

    def step(name: str, new: NDArray[np.int64], cache: Cache, forced: NDArray[np.bool_]) -> float:
        mask = np.ones((1, cache.length + new.shape[1]), np.int64)
        started = time.perf_counter()
        runtimes[name].step(new, mask, cache, forced if name == "routed" else None)
        return time.perf_counter() - started

    result: dict[str, Any] = {"sparsity": share, "realized": float(1 - gates.mean())}
    keep = {unit.name: float(gates[index].mean()) for index, unit in enumerate(model.units)}
    kept = {unit.name: float(steps[:, index].mean()) for index, unit in enumerate(model.units)}
    ideals = {
        "prefill": 1 / flops_ratio(model, keep, load.prefill),
        "decode": 1 / bytes_ratio(model, kept, load.past + load.decode // 2),
    }
    for name, run, count in (("prefill", time_prefill, 1), ("decode", time_decode, load.decode)):
        dense, routed = _medians(run, load.rounds)
        result[name] = {
            "dense_ms": 1e3 * dense / count,
            "routed_ms": 1e3 * routed / count,
            "speedup": dense / routed,
            "ideal": ideals[name],
            "efficiency": dense / routed / ideals[name],
        }
    return result


def _medians(run: Callable[[], dict[str, float]], rounds: int) -> tuple[float, float]:
    """Return the median seconds of the dense and of the routed model, after one round that does not count."""
    taken = [run() for _ in range(rounds + 1)][1:]
    dense, routed = (float(np.median([seconds[name] for seconds in taken])) for name in ("dense", "routed"))
    return dense, routed


def bytes_ratio(model: RoutedForCausalLM, keep: dict[str, float], past: int) -> float:
    """Return routed over dense bytes that one decode step reads: weights and cache.

    A linear's FLOPs for one token are twice its weights, so weights are counted by `irc.flops`; the cache is read
    by executed attention units alone.

    Args:
        model: Rewritten model.
        keep: Share of steps in which a unit executes.
        past: Tokens in the cache.
    """
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2.0 * (past + 1) * config.num_key_value_heads * size
    head = head_flops(model) / 2
    dense = routed = head
    for unit in model.units:
        count = unit_flops(model, 0)[unit.name]
        attention = cache if unit.kind == "attention" else 0.0
        weights = count.gated / 2
        dense += count.always / 2 + weights + attention
        share = keep[unit.name]
        routed += (count.always + count.router + count.forecaster * (1 - share)) / 2 + (weights + attention) * share
    return routed / dense
