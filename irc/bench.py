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
from irc.routed import RoutedForCausalLM, RoutingSpec, build_routed
from irc.runtime import Runtime, Step
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
    """What is timed: a prefill of `prefill` tokens, and `decode` steps of one token after a past of `past`."""

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
    calls alternate. Decode steps draw new gates for each token.

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

    prompt, token = ids(load.prefill), ids(1)
    gates = random.random((units, 1, load.prefill)) >= share
    steps = random.random((load.decode, units, 1, 1)) >= share

    def prefill(name: str) -> Step:
        runtime = runtimes[name]
        cache = runtime.empty_cache(1)
        return runtime.step(prompt, np.ones((1, load.prefill), np.int64), cache, gates if name == "routed" else None)

    past = {}
    for name, runtime in runtimes.items():
        past[name] = runtime.empty_cache(1)
        all_executed = np.ones((units, 1, load.past), bool) if name == "routed" else None
        runtime.step(ids(load.past), np.ones((1, load.past), np.int64), past[name], all_executed)

    def decode(name: str) -> None:
        for index in range(load.decode):
            forced = steps[index] if name == "routed" else None
            cache = past[name].copy()
            runtimes[name].step(token, np.ones((1, load.past + 1), np.int64), cache, forced)

    result: dict[str, Any] = {"sparsity": share, "realized": float(1 - gates.mean())}
    keep = {unit.name: float(gates[index].mean()) for index, unit in enumerate(model.units)}
    kept = {unit.name: float(steps[:, index].mean()) for index, unit in enumerate(model.units)}
    ideals = {
        "prefill": 1 / flops_ratio(model, keep, load.prefill),
        "decode": 1 / bytes_ratio(model, kept, load.past),
    }
    for name, run, count in (("prefill", prefill, 1), ("decode", decode, load.decode)):
        dense, routed = _alternate(run, load.rounds)
        result[name] = {
            "dense_ms": 1e3 * dense / count,
            "routed_ms": 1e3 * routed / count,
            "speedup": dense / routed,
            "ideal": ideals[name],
            "efficiency": dense / routed / ideals[name],
        }
    return result


def _alternate(run: Callable[[str], Any], rounds: int) -> tuple[float, float]:
    """Return the median seconds of the dense and of the routed model, timed in turns after one call each."""
    seconds: dict[str, list[float]] = {"dense": [], "routed": []}
    for index in range(rounds + 1):
        for name, times in seconds.items():
            started = time.perf_counter()
            run(name)
            if index:
                times.append(time.perf_counter() - started)
    return float(np.median(seconds["dense"])), float(np.median(seconds["routed"]))


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
