"""Times one model at one sparsity: opens the models, draws tokens and gates, and returns the figures."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irc.bench.ideal_speedup import dense_bytes, dense_flops, ideal_decode_speedup, ideal_prefill_speedup
from irc.bench.measure import Timing, Workload, decode_in_turns, prefill_in_turns
from irc.bench.models import ModelPair, dense_export, shallower
from irc.bench.peers import OTHER_RUNTIMES, open_peer
from irc.bench.precision import Precision
from irc.bench.shapes import Shape
from irc.bench.timed_models import ExportedModel, TimedModel
from irc.deployment.forced import open_forced
from irc.errors import IrcError
from irc.files.untrusted import first_line
from irc.model.flops import head_flops, unit_flops
from irc.runtime.native import CHOICES
from irc.runtime.session import Runtime

log = logging.getLogger(__name__)

TextTokens = NDArray[np.int64]


@dataclass(frozen=True)
class Load:
    """What to time.

    Attributes:
        batches: Batch sizes, each timed separately.
        prefill: Prompt lengths in tokens, each timed separately.
        decode_batches: Batch sizes in decoding; `batches` if empty.
        past: Tokens in the cache before decoding.
        decode: Timed steps of one token per sequence.
        rounds: Timed rounds. The median is reported.
    """

    batches: Sequence[int] = (1,)
    prefill: Sequence[int] = (512,)
    decode_batches: Sequence[int] = ()
    past: int = 128
    decode: int = 64
    rounds: int = 7

    def window(self, length: int) -> int:
        """Return how many tokens a sequence needs, for a prompt of this length and for past and decoded tokens."""
        return max(length, self.past + self.decode)


@dataclass(frozen=True)
class Share:
    """The shares of tokens that attention units and FFN units skip.

    Attributes:
        attention: Share of attention units, 0 to 1.
        ffn: Share of FFN units, 0 to 1.
    """

    attention: float
    ffn: float

    @property
    def mean(self) -> float:
        """The share over all units; each layer has one of each kind."""
        return (self.attention + self.ffn) / 2


@dataclass
class Scenario:
    """One model at one sparsity.

    Attributes:
        pair: The model, dense and routed.
        share: Shares that the drawn gates skip, or the point of a bundle's dial; None for a bundle's own sparsity.
        shape: Sizes of a random model.
        text: Tokens that a bundle reads; None for a random model.
        work: Folder for the models of peers.
        provider: cpu or cuda.
        precision: Of weights, and of everything else.
        seed: Seed of tokens and gates.
        flops: The point of a bundle's dial, if that was made for FLOPs.
    """

    pair: ModelPair
    share: Share | None
    shape: Shape
    text: TextTokens | None
    work: Path
    provider: str
    precision: Precision
    seed: int
    flops: float | None = None

    @property
    def forced(self) -> bool:
        """Whether random gates replace the routers' decisions."""
        return self.text is None

    def routed(self, ops: str) -> ExportedModel:
        """Open the routed model with a choice of kernels."""
        opened = open_forced if self.forced else Runtime
        return ExportedModel(opened(self.pair.routed, self.provider, ops=ops), self.forced)

    def open_models(
        self,
        ops: Sequence[str],
        peers: Sequence[str],
        context: int,
        missing: dict[str, str],
        opened: dict[str, TimedModel],
    ) -> dict[str, TimedModel]:
        """Open the models to time, the dense model first.

        Args:
            ops: Kernels of our operators.
            peers: Other ways to run a model, of `PEERS`.
            context: Longest text, in tokens.
            missing: Reasons why peers cannot be timed, by peer; extended in place.
            opened: Models that an earlier scenario of the same pair opened; extended in place.

        Returns:
            The models by name.
        """
        if not opened:
            opened["dense"] = ExportedModel(Runtime(self.pair.dense, self.provider), False)
            for choice in ops:
                routed = self.routed(choice)
                # Name a library by its path, and any other choice by the kernels that are used in the end.
                opened[choice if choice not in CHOICES else routed.runtime.ops] = routed
        opened.pop("static", None)  # its number of layers depends on this scenario's share
        for peer in peers:
            if peer in missing or peer in opened:
                continue
            try:
                model = self._static(context) if peer == "static" else self._other_runtime(peer, context)
                model.step(np.zeros((1, 2), np.int64), model.empty(1), None)
                opened[peer] = model
            except Exception as error:  # a peer that fails, for any reason, must not stop the others
                missing[peer] = first_line(error, 1000)
                log.warning("%s is not timed: %s", peer, missing[peer])
        return dict(opened)

    def rows(self, load: Load, models: Mapping[str, TimedModel]) -> list[dict[str, Any]]:
        """Time every batch size and prompt length; return a row of figures for each, as `irc bench --json` prints."""
        return [*self._prefill_rows(load, models), *self._decode_rows(load, models)]

    def _prefill_rows(self, load: Load, models: Mapping[str, TimedModel]) -> Iterator[dict[str, Any]]:
        model = self.pair.model
        for batch in load.batches:
            for length in load.prefill:
                workload = self.workload(batch, length, load)
                execute = self._executed_in_prompt(workload, models)
                timings = prefill_in_turns(models, workload, load.rounds)
                ideal = ideal_prefill_speedup(model, execute)
                flops = dense_flops(model, batch, length)
                yield {
                    "phase": "prefill",
                    **self._sparsities(execute),
                    "batch": batch,
                    "tokens": length,
                    "contenders": self._figures(timings, ideal, length, batch * length),
                    "dense_flops_per_s": flops / timings["dense"].median,
                }

    def _decode_rows(self, load: Load, models: Mapping[str, TimedModel]) -> Iterator[dict[str, Any]]:
        model = self.pair.model
        mean_past = load.past + load.decode / 2
        for batch in load.decode_batches or load.batches:
            workload = self.workload(batch, 1, load)
            execute = self._executed_in_steps(workload, models)
            timings = decode_in_turns(models, workload, load.rounds)
            ideal = ideal_decode_speedup(model, execute, mean_past, self.precision)
            bytes_read = load.decode * dense_bytes(model, batch, mean_past, self.precision)
            yield {
                "phase": "decode",
                **self._sparsities(execute),
                "batch": batch,
                "tokens": load.past,
                "contenders": self._figures(timings, ideal, load.past, batch * load.decode, load.decode),
                "dense_bytes_per_s": bytes_read / timings["dense"].median,
            }

    def workload(self, batch: int, length: int, load: Load) -> Workload:
        """Return the tokens and gates for a batch size and prompt length."""
        if self.text is not None:
            return _read_workload(self.text, batch, length, load)
        assert self.share is not None
        random = np.random.default_rng(self.seed)
        model = self.pair.model
        units, vocabulary = len(model.units), model.config.vocab_size
        shares = [self.share.attention if unit.kind == "attention" else self.share.ffn for unit in model.units]
        skipped = np.array(shares).reshape(units, 1, 1)
        return Workload(
            prompt=random.integers(0, vocabulary, (batch, length)),
            past=random.integers(0, vocabulary, (batch, load.past)),
            tokens=random.integers(0, vocabulary, (load.decode, batch, 1)),
            prompt_gates=random.random((units, batch, length)) >= skipped,
            token_gates=random.random((load.decode, units, batch, 1)) >= skipped,
        )

    def _executed_in_prompt(self, workload: Workload, models: Mapping[str, TimedModel]) -> NDArray[np.bool_]:
        """Return what is executed of the prompt, bool [units, batch, tokens]."""
        if workload.prompt_gates is not None:
            return workload.prompt_gates
        routed = _first_routed(models)
        return routed.routes(workload.prompt, routed.empty(len(workload.prompt)))

    def _executed_in_steps(self, workload: Workload, models: Mapping[str, TimedModel]) -> NDArray[np.bool_]:
        """Return what is executed of the decoded tokens, bool [steps, units, batch]."""
        if workload.token_gates is not None:
            return workload.token_gates[..., 0]
        routed = _first_routed(models)
        state = routed.empty(len(workload.past))
        routed.step(workload.past, state, None)
        return np.stack([routed.routes(token, state)[..., 0] for token in workload.tokens])

    def _sparsities(self, execute: NDArray[np.bool_]) -> dict[str, float | None]:
        nominal = None if self.share is None else self.share.mean
        return {"sparsity": nominal, "flops": self.flops, "realized": float(1 - execute.mean())}

    def _figures(
        self, timings: Mapping[str, Timing], ideal: float, context: int, tokens_read: int, steps: int = 1
    ) -> dict[str, dict[str, float]]:
        """Return the figures of every model.

        Args:
            timings: Of each model.
            ideal: Ideal speed-up of the routed model.
            context: Tokens in the prompt or in the cache.
            tokens_read: Tokens that are read in a round, over all sequences.
            steps: Steps in a round.
        """
        dense = timings["dense"].median
        figures = {}
        for name, timing in timings.items():
            entry = {
                "ms": 1e3 * timing.median / steps,
                "spread": timing.spread,
                "tokens_per_s": tokens_read / timing.median,
                "speedup": dense / timing.median,
            }
            if name != "dense" and name not in OTHER_RUNTIMES:
                entry["ideal"] = self._ideal_static_speedup(context) if name == "static" else ideal
                entry["efficiency"] = entry["speedup"] / entry["ideal"]
            figures[name] = entry
        return figures

    def _static(self, context: int) -> TimedModel:
        assert self.share is not None
        shape = shallower(self.shape, self.share.mean)
        folder = dense_export(shape, self.work, self.precision, context, self.seed)
        return ExportedModel(Runtime(folder, self.provider), False)

    def _ideal_static_speedup(self, context: int) -> float:
        """Return the FLOPs of the dense model over those of the shallower one; the ratio of their bytes is the same."""
        assert self.share is not None
        model = self.pair.model
        units = sum(count.dense for count in unit_flops(model, context).values())
        kept = shallower(self.shape, self.share.mean).layers / self.shape.layers
        return (head_flops(model) + units) / (head_flops(model) + units * kept)

    def _other_runtime(self, peer: str, context: int) -> TimedModel:
        return open_peer(peer, self.pair, self.work, self.provider, self.precision, context)


def _read_workload(text: TextTokens, batch: int, length: int, load: Load) -> Workload:
    """Return a workload of windows that are spread evenly over a text."""
    window = load.window(length)
    starts = np.linspace(0, len(text) - window, batch).astype(int)
    windows = np.stack([text[start : start + window] for start in starts])
    tokens = windows[:, load.past : load.past + load.decode].T[:, :, None]
    return Workload(windows[:, :length].copy(), windows[:, : load.past].copy(), tokens.copy(), None, None)


def _first_routed(models: Mapping[str, TimedModel]) -> ExportedModel:
    for name, model in models.items():
        if isinstance(model, ExportedModel) and name != "dense":
            return model
    raise IrcError("no routed model is open; this is a bug in irc, please report it")
