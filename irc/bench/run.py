"""`bench`: writes the models, times them in turns, and compares the speed-up with the ideal one."""

from __future__ import annotations

import math
import os
import resource
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from exporters.onnx_dtypes import of_weights
from irc.bench.llama_cpp import check_llama_cpp
from irc.bench.models import ModelPair, bundle_pair, random_pair
from irc.bench.peers import PEERS
from irc.bench.precision import Precision, precision_named
from irc.bench.profile import profile_operators
from irc.bench.scenario import Load, Scenario, Share, TextTokens
from irc.bench.shapes import Shape
from irc.bench.timed_models import TimedModel
from irc.errors import InputError
from irc.progress import ProgressFactory
from irc.recipe.target import Target
from irc.runtime.native import choose_library
from irc.runtime.provider import choose_provider


@dataclass(frozen=True)
class Subject:
    """The model to time: one with random weights and random gates, or a bundle with its own routes.

    Attributes:
        shape: Sizes of the random model.
        bundle: Folder of a bundle, or an empty string for a random model.
        text: Tokens that the bundle reads; None for a random model.
        flops: Points of the bundle's dial, if that was made for FLOPs.
    """

    shape: Shape = field(default_factory=Shape)
    bundle: str = ""
    text: TextTokens | None = None
    flops: Sequence[float] = ()


@dataclass(frozen=True)
class BenchOptions:
    """How to run the models, and what else to time.

    Attributes:
        provider: Execution provider of ONNX Runtime: auto, cpu or cuda.
        dtype: fp32, fp16, bf16, int4 or int8.
        ops: Kernels of our operators, each timed separately (see `irc.runtime.native.choose_library`).
        peers: Other ways to run a model, of `PEERS`.
        profile: Whether to sum the time by operator.
        seed: Seed of weights, tokens and gates.
    """

    provider: str = "auto"
    dtype: str = "fp32"
    ops: Sequence[str] = ("auto",)
    peers: Sequence[str] = ()
    profile: bool = False
    seed: int = 0


def bench(
    subject: Subject,
    shares: Sequence[Share],
    load: Load,
    progress: ProgressFactory,
    options: BenchOptions = BenchOptions(),
) -> dict[str, Any]:
    """Time a routed model and its dense form in turns, in one process.

    Args:
        subject: The model. Random gates tell a random model what to execute; they are drawn anew for each step of
            decoding, and the routers run and are timed. A bundle follows its routers.
        shares: Shares that the random gates skip, or points of a bundle's dial; none for a bundle's own target.
        load: What to time.
        progress: Makes progress bars.
        options: How to run the models, and what else to time.

    Returns:
        The JSON object that `irc bench --json` prints.

    Raises:
        InputError: A setting cannot be used.
    """
    options = replace(options, provider=choose_provider(options.provider))
    provider, seed = options.provider, options.seed
    precision = precision_named(options.dtype, provider)
    _check(subject, shares, load, options, precision)
    rows: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    opened: dict[Path, dict[str, TimedModel]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work, context = Path(folder), max(*load.prefill, load.past + load.decode) + 1
        with progress("bench", max(1, len(shares) + len(subject.flops))) as bar:
            for done, (share, flops, pair) in enumerate(
                _pairs(subject, shares, work, precision, context, seed, provider), start=1
            ):
                scenario = Scenario(pair, share, subject.shape, subject.text, work, provider, precision, seed, flops)
                opened = {pair.routed: opened.get(pair.routed, {})}  # closes the models of an earlier pair
                models = scenario.open_models(options.ops, options.peers, context, missing, opened[pair.routed])
                rows += scenario.rows(load, models)
                if options.profile:
                    profiles += profile_operators(scenario, load, options.ops[0])
                bar.update(done, **({} if share is None else {"sparsity": share.mean}))
    return {
        "subject": subject.bundle or asdict(subject.shape),
        "load": asdict(load),
        "provider": provider,
        "dtype": precision.name,
        "cores": len(os.sched_getaffinity(0)),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "results": rows,
        "profile": profiles,
        "not_timed": missing,
    }


def _pairs(
    subject: Subject, shares: Sequence[Share], work: Path, precision: Precision, context: int, seed: int, provider: str
) -> Iterator[tuple[Share | None, float | None, ModelPair]]:
    """Yield the models to time for each share and each FLOPs ratio. A random model is the same for all shares."""
    if not subject.bundle:
        pair = random_pair(subject.shape, work, precision, context, seed, provider)
        for share in shares:
            yield share, None, pair
        return
    if not shares and not subject.flops:
        yield None, None, bundle_pair(subject.bundle, work, precision, None, provider)
    for share in shares:
        yield share, None, bundle_pair(subject.bundle, work, precision, Target("sparsity", share.mean), provider)
    for ratio in subject.flops:
        yield None, ratio, bundle_pair(subject.bundle, work, precision, Target("flops", ratio), provider)


def _check(subject: Subject, shares: Sequence[Share], load: Load, options: BenchOptions, precision: Precision) -> None:
    provider, dtype = options.provider, precision.computed
    if not shares and not subject.bundle:
        raise InputError("sparsities is empty; give at least one, such as 0.25", options=("sparsities",))
    subject.shape.check()
    for name, values in (("batches", load.batches), ("prefill", load.prefill), ("ops", options.ops)):
        if not values:
            raise InputError(f"{name} is empty; give at least one value", options=(name,))
    if provider == "cpu" and not of_weights(dtype).on_cpu:
        raise InputError(
            f"dtype {dtype} does not run on ONNX Runtime's CPU provider; use fp32 or fp16", options=("dtype",)
        )
    for choice in options.ops:
        choose_library(choice, provider, dtype)  # refuses a library that does not load, before anything is written
    for peer in options.peers:
        if peer not in PEERS:
            raise InputError(f"unknown peer '{peer}'; choose from {', '.join(PEERS)}", options=("peers",))
    if "llama.cpp" in options.peers:
        check_llama_cpp(provider, [*load.batches, *load.decode_batches])
    if precision.quantization is not None and (peers := [peer for peer in options.peers if peer.startswith("hf-")]):
        raise InputError(f"peer {peers[0]} runs no {precision.name}; leave it out", options=("peers",))
    if subject.bundle and "static" in options.peers:
        raise InputError(
            "peer static is a shallower random model and needs a shape; leave it out for a bundle", options=("peers",)
        )
    if subject.bundle and any(share.attention != share.ffn for share in shares):
        raise InputError("the dial of a bundle sets one sparsity for all units; give numbers such as 0.25")
    if subject.text is not None:
        _check_text(len(subject.text), load)


def _check_text(tokens: int, load: Load) -> None:
    needed = [(batch, load.window(length)) for batch in load.batches for length in load.prefill]
    needed += [(batch, load.window(1)) for batch in load.decode_batches or load.batches]
    batch, window = max(needed, key=math.prod)
    if tokens < batch * window:
        raise InputError(
            f"the held-out split of the text has {tokens} tokens, but {batch} x {window} are needed; give more text or "
            "smaller sizes",
            options=("data", "batches", "decode_batches", "prefill", "past", "decode"),
        )
