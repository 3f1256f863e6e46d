"""bench(): writes models, times them in turns, and holds what is measured to the ideal."""

from __future__ import annotations

import math
import os
import resource
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from irc.bench.models import Pair, bundle_pair, random_pair
from irc.bench.profile import where_time_goes
from irc.bench.scenario import PEERS, Load, Share, Stage, TextTokens
from irc.bench.shapes import Shape
from irc.bench.timed_models import Contender
from irc.dtypes import BYTES
from irc.errors import InputError
from irc.progress import ProgressFactory
from irc.runtime.native import choose_library
from irc.runtime.session import choose_provider


@dataclass(frozen=True)
class Subject:
    """Which model is timed: a random one of a shape under drawn gates, or a bundle under its own routes.

    Attributes:
        shape: Of the random model.
        bundle: Folder of a bundle, empty for a random model.
        text: What a bundle reads; None for a random model.
    """

    shape: Shape = field(default_factory=Shape)
    bundle: str = ""
    text: TextTokens | None = None


def bench(
    subject: Subject,
    shares: Sequence[Share],
    load: Load,
    progress: ProgressFactory,
    *,
    provider: str = "auto",
    dtype: str = "fp32",
    ops: Sequence[str] = ("auto",),
    peers: Sequence[str] = (),
    profile: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Time a model against its dense self, in turns in one process.

    Args:
        subject: The model. A random one is told what to execute, by gates that are drawn anew for every step of
            decoding; its routers run and are counted. A bundle follows its routers.
        shares: What the drawn gates skip; of a bundle, points of its dial, none for its own sparsity.
        load: What is timed.
        progress: Makes progress bars.
        provider: Of ONNX Runtime.
        dtype: fp32, fp16 or bf16.
        ops: Kernels of our operators, each choice timed by itself (see `irc.runtime.native.choose_library`).
        peers: What is timed beside them, of `PEERS`.
        profile: Whether to say where the time goes, by operator.
        seed: Of weights, tokens and gates.

    Returns:
        What `irc bench --json` prints.

    Raises:
        InputError: A setting cannot be used.
    """
    provider = choose_provider(provider)
    _check(subject, shares, load, provider, dtype, ops, peers)
    rows: list[dict[str, Any]] = []
    profiles: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    opened: dict[Path, dict[str, Contender]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work, context = Path(folder), max(*load.prefill, load.past + load.decode) + 1
        with progress("bench", max(1, len(shares))) as bar:
            for done, (share, pair) in enumerate(
                _pairs(subject, shares, work, dtype, context, seed, provider), start=1
            ):
                stage = Stage(pair, share, subject.shape, subject.text, work, provider, dtype, seed)
                opened = {pair.routed: opened.get(pair.routed, {})}  # those of a pair that is done are closed
                rows += stage.rows(load, stage.contenders(ops, peers, context, missing, opened[pair.routed]))
                if profile:
                    profiles += where_time_goes(stage, load, ops[0])
                bar.update(done, **({} if share is None else {"sparsity": share.mean}))
    return {
        "subject": subject.bundle or asdict(subject.shape),
        "load": asdict(load),
        "provider": provider,
        "dtype": dtype,
        "cores": len(os.sched_getaffinity(0)),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "results": rows,
        "profile": profiles,
        "not_timed": missing,
    }


def _pairs(
    subject: Subject, shares: Sequence[Share], work: Path, dtype: str, context: int, seed: int, provider: str
) -> Iterator[tuple[Share | None, Pair]]:
    """Return what is timed, point by point; a random model is the same for all."""
    if not subject.bundle:
        pair = random_pair(subject.shape, work, dtype, context, seed, provider)
        for share in shares:
            yield share, pair
        return
    if not shares:
        yield None, bundle_pair(subject.bundle, work, dtype, None, provider)
    for share in shares:
        yield share, bundle_pair(subject.bundle, work, dtype, share.mean, provider)


def _check(
    subject: Subject,
    shares: Sequence[Share],
    load: Load,
    provider: str,
    dtype: str,
    ops: Sequence[str],
    peers: Sequence[str],
) -> None:
    if not shares and not subject.bundle:
        raise InputError("--sparsities is empty; give at least one, such as 0.25")
    subject.shape.check()
    for name, values in (("--batch", load.batches), ("--prefill", load.prefill), ("--ops", ops)):
        if not values:
            raise InputError(f"{name} is empty; give at least one")
    if dtype not in BYTES:
        raise InputError(f"--dtype is '{dtype}'; choose from {', '.join(BYTES)}")
    if dtype == "bf16" and provider == "cpu":
        raise InputError("--dtype is bf16, which ONNX Runtime's CPU provider cannot run; give fp32 or fp16")
    for each in ops:
        choose_library(each, provider, dtype)  # refuses what does not load before anything is made
    for peer in peers:
        if peer not in PEERS:
            raise InputError(f"--peers names '{peer}'; choose from {', '.join(PEERS)}")
    if subject.bundle and "static" in peers:
        raise InputError("peer static is a shallower random model; it goes with --shape, not with a bundle")
    if subject.bundle and any(share.attention != share.ffn for share in shares):
        raise InputError("a bundle's dial sets one sparsity for the model; give shares such as 0.25")
    if subject.text is not None:
        _check_text(len(subject.text), load)


def _check_text(tokens: int, load: Load) -> None:
    read = [(batch, load.window(length)) for batch in load.batches for length in load.prefill]
    read += [(batch, load.window(1)) for batch in load.decode_batches or load.batches]
    batch, window = max(read, key=math.prod)
    if tokens < batch * window:
        raise InputError(
            f"the held-out part of the text has {tokens} tokens, {batch} x {window} are read; give more text, or "
            "smaller --batch, --prefill, --past, --decode"
        )
