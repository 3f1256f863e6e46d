"""One point of a bench: the contenders, the tokens and gates they are given, and the rows of figures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irc.bench.ideal_speedup import dense_bytes, dense_flops, ideal_decode, ideal_prefill
from irc.bench.measure import Timing, Work, decode_in_turns, prefill_in_turns
from irc.bench.models import Pair, dense_export, genai_export, shallower
from irc.bench.shapes import Shape
from irc.bench.timed_models import Contender, GenaiFolder, OurModel, Transformers
from irc.files.untrusted import first_line
from irc.model.flops import head_flops, unit_flops
from irc.runtime.native import CHOICES
from irc.runtime.session import Runtime

log = logging.getLogger(__name__)

OTHER_RUNTIMES = ("hf-eager", "hf-compiled", "genai")  # of the dense model: nothing is skipped
PEERS = ("static", *OTHER_RUNTIMES)
TextTokens = NDArray[np.int64]


@dataclass(frozen=True)
class Load:
    """What is timed.

    Attributes:
        batches: Sequences at a time.
        prefill: Tokens of the prompt, each length by itself.
        decode_batches: Sequences at a time in decoding; as many as of the prompt when empty.
        past: Tokens in the cache before decoding.
        decode: Timed steps of one token a sequence.
        rounds: Timed rounds, whose median counts.
    """

    batches: Sequence[int] = (1,)
    prefill: Sequence[int] = (512,)
    decode_batches: Sequence[int] = ()
    past: int = 128
    decode: int = 64
    rounds: int = 7

    def window(self, length: int) -> int:
        """Return the tokens of a text that a sequence takes: a prompt of a length, or the past and what is decoded."""
        return max(length, self.past + self.decode)


@dataclass(frozen=True)
class Share:
    """Share of tokens that attention units skip, and FFN units."""

    attention: float
    ffn: float

    @property
    def mean(self) -> float:
        """Of all units: a layer has one of each."""
        return (self.attention + self.ffn) / 2


@dataclass
class Stage:
    """One model at one sparsity.

    Attributes:
        pair: The model, dense and routed.
        share: What drawn gates skip; None where a bundle follows its routers at its own sparsity.
        shape: Of a random model.
        text: What a bundle reads; None for a random model.
        work: Folder for peers.
        provider: cpu or cuda.
        dtype: fp32, fp16 or bf16.
        seed: Of tokens and gates.
    """

    pair: Pair
    share: Share | None
    shape: Shape
    text: TextTokens | None
    work: Path
    provider: str
    dtype: str
    seed: int

    @property
    def forced(self) -> bool:
        """Whether gates are drawn."""
        return self.text is None

    def routed(self, ops: str) -> OurModel:
        """Return the routed model on some kernels."""
        return OurModel(Runtime(self.pair.routed, self.provider, forced=self.forced, ops=ops), self.forced)

    def contenders(
        self,
        ops: Sequence[str],
        peers: Sequence[str],
        context: int,
        missing: dict[str, str],
        opened: dict[str, Contender],
    ) -> dict[str, Contender]:
        """Open what is timed, the dense model first.

        Args:
            ops: Kernels of our operators.
            peers: Other ways to run a model.
            context: Most tokens of a text.
            missing: Receives why a peer cannot be timed.
            opened: What an earlier stage of the same pair opened, taken from here, and what this one opens.
        """
        if not opened:
            opened["dense"] = OurModel(Runtime(self.pair.dense, self.provider), False)
            for choice in ops:
                routed = self.routed(choice)
                # What was used, not what was asked for; a library by its path, beside the installed one.
                opened[choice if choice not in CHOICES else routed.runtime.ops] = routed
        opened.pop("static", None)  # it has as many layers as this stage's share leaves
        makers: dict[str, Callable[[], Contender]] = {
            "static": lambda: self._static(context),
            "hf-eager": lambda: Transformers(self.pair.base, self.dtype, self.provider, compiled=False),
            "hf-compiled": lambda: Transformers(self.pair.base, self.dtype, self.provider, compiled=True),
            "genai": lambda: self._genai(),
        }
        for peer in peers:
            if peer in missing or peer in opened:
                continue
            try:
                contender = makers[peer]()
                contender.step(np.zeros((1, 2), np.int64), contender.empty(1), None)
                opened[peer] = contender
            except Exception as error:  # whatever another project's code raises, the others are timed
                missing[peer] = first_line(error, 1000)
                log.warning("%s is not timed: %s", peer, missing[peer])
        return dict(opened)

    def rows(self, load: Load, contenders: Mapping[str, Contender]) -> list[dict[str, Any]]:
        """Time every batch size and length; return one row for each, as `irc bench --json` prints them."""
        rows = []
        model = self.pair.model
        for batch in load.batches:
            for length in load.prefill:
                work = self.work_of(batch, length, load)
                execute = self._executed(work, contenders)[0]
                timings = prefill_in_turns(contenders, work, load.rounds)
                rows.append(self._row("prefill", batch, length, 1, execute, timings, ideal_prefill(model, execute)))
                rows[-1]["dense_flops_per_s"] = dense_flops(model, batch, length) / timings["dense"].median
        past = load.past + load.decode / 2
        for batch in load.decode_batches or load.batches:
            work = self.work_of(batch, 1, load)
            execute = self._executed(work, contenders)[1]
            timings = decode_in_turns(contenders, work, load.rounds)
            ideal = ideal_decode(model, execute, past)
            rows.append(self._row("decode", batch, load.past, load.decode, execute, timings, ideal))
            read = load.decode * dense_bytes(model, batch, past, self.dtype)
            rows[-1]["dense_bytes_per_s"] = read / timings["dense"].median
        return rows

    def work_of(self, batch: int, length: int, load: Load) -> Work:
        """Return tokens and gates of a batch size and prompt length."""
        random = np.random.default_rng(self.seed)
        units = len(self.pair.model.units)
        if self.text is None:
            assert self.share is not None
            skipped = np.array(
                [getattr(self.share, unit.kind.replace("mlp", "ffn")) for unit in self.pair.model.units]
            ).reshape(units, 1, 1)
            vocabulary = self.pair.model.config.vocab_size
            prompt = random.integers(0, vocabulary, (batch, length))
            before = random.integers(0, vocabulary, (batch, load.past))
            tokens = random.integers(0, vocabulary, (load.decode, batch, 1))
            gates = random.random((units, batch, length)) >= skipped
            return Work(prompt, before, tokens, gates, random.random((load.decode, units, batch, 1)) >= skipped)
        window = load.window(length)
        starts = np.linspace(0, len(self.text) - window, batch).astype(int)
        windows = np.stack([self.text[start : start + window] for start in starts])
        tokens = windows[:, load.past : load.past + load.decode].T[:, :, None]
        return Work(windows[:, :length].copy(), windows[:, : load.past].copy(), tokens.copy(), None, None)

    def _executed(self, work: Work, contenders: Mapping[str, Contender]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return what executes of the prompt [units, batch, tokens], and of the tokens [steps, units, batch]."""
        if work.gates is not None and work.steps is not None:
            return work.gates, work.steps[..., 0]
        routed = next(c for name, c in contenders.items() if isinstance(c, OurModel) and name != "dense")
        prompt = routed.routes(work.prompt, routed.empty(len(work.prompt)))
        state = routed.empty(len(work.before))
        routed.step(work.before, state, None)
        steps = np.stack([routed.routes(token, state)[..., 0] for token in work.tokens])
        return prompt, steps

    def _row(
        self,
        phase: str,
        batch: int,
        tokens: int,
        steps: int,
        execute: NDArray[np.bool_],
        timings: Mapping[str, Timing],
        ideal: float,
    ) -> dict[str, Any]:
        read = batch * (tokens if phase == "prefill" else steps)
        dense = timings["dense"].median
        figures = {}
        for name, timing in timings.items():
            entry = {
                "ms": 1e3 * timing.median / steps,
                "spread": timing.spread,
                "tokens_per_s": read / timing.median,
                "speedup": dense / timing.median,
            }
            most = self._static_ideal(tokens) if name == "static" else ideal
            if name != "dense" and name not in OTHER_RUNTIMES:
                entry |= {"ideal": most, "efficiency": entry["speedup"] / most}
            figures[name] = entry
        nominal = None if self.share is None else self.share.mean
        realized = float(1 - execute.mean())
        place = {"phase": phase, "sparsity": nominal, "realized": realized, "batch": batch, "tokens": tokens}
        return {**place, "contenders": figures}

    def _static(self, context: int) -> Contender:
        assert self.share is not None
        shape = shallower(self.shape, self.share.mean)
        return OurModel(Runtime(dense_export(shape, self.work, self.dtype, context, self.seed), self.provider), False)

    def _static_ideal(self, context: int) -> float:
        """Return dense over shallower FLOPs; of the weights too, for both follow the number of layers."""
        assert self.share is not None
        model = self.pair.model
        units = sum(count.dense for count in unit_flops(model, context).values())
        left = shallower(self.shape, self.share.mean).layers / self.shape.layers
        return (head_flops(model) + units) / (head_flops(model) + units * left)

    def _genai(self) -> Contender:
        folder = self.work / "genai"
        if not folder.exists():
            genai_export(self.pair.base, self.work, self.provider, self.dtype)
        return GenaiFolder(folder, self.provider, self.dtype)
