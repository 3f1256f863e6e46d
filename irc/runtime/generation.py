"""Generates text with an exported model: greedy or sampled, streamed, stopped by strings or the end of text."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irc.errors import InputError, IrcError
from irc.files.untrusted import first_line, read_json
from irc.runtime.session import Runtime, Step
from irc.text.tokenizer import TextTokenizer, open_tokenizer

log = logging.getLogger(__name__)

_COLDEST = 1e-3
_TAIL = 16
_CHANGES_TOKENS: dict[str, object] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "min_new_tokens": 0,
    "num_beams": 1,
}
"""Settings of transformers' generation that this loop does not have, and the values with which they do nothing."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above, logits are divided by it and sampled.
        top_k: Sample among the k likeliest; 0 among all.
        top_p: Sample among the likeliest that together have this probability.
        seed: Seed of the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuse values out of range."""
        if self.temperature != 0 and not _COLDEST <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; give 0 (greedy), or {_COLDEST} or more")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; give 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; give a share above 0, at most 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; give 0 or more")


@dataclass
class Generated:
    """A finished text.

    Attributes:
        text: Without the prompt, up to a stop string.
        tokens: Ids that were generated.
        stopped: Why the text ended: `end` (end of text), `stop` (a stop string), `length`, `context` or `interrupted`.
        prompt_tokens: Tokens of the prompt.
        prefill_seconds: Seconds until the first token.
        decode_seconds: Seconds after the first token.
        executed: Number of executed (token, unit) pairs.
        pairs: Number of all (token, unit) pairs.
        kv_saved: Share of keys and values that were not stored.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stopped: str = "length"
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    executed: int = 0
    pairs: int = 0
    kv_saved: float = 0.0

    @property
    def skipped(self) -> float:
        """Share of (token, unit) pairs that were approximated."""
        return 1 - self.executed / self.pairs if self.pairs else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second after the first."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else 0.0

    def count(self, step: Step) -> None:
        """Add a step's decisions."""
        self.executed += int(step.execute.sum())
        self.pairs += step.execute.size


class Generator:
    """A runtime with its tokenizer.

    Args:
        runtime: The session.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        folder = runtime.exported.folder
        self.tokenizer: TextTokenizer = open_tokenizer(folder)
        self.end = _end_tokens(folder, self.tokenizer.eos_token_id)
        _warn_of_ignored(folder)

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt.

        Raises:
            InputError: It is not valid text, has no token or one that the model does not know, or fills the context.
        """
        _check_text(prompt, "the prompt")
        ids = self.tokenizer.encode(prompt)
        self._room(ids, 0)
        if max(ids) >= self.runtime.vocabulary:
            raise InputError(
                f"{self.runtime.exported.folder}: the tokenizer makes the id {max(ids)} of the prompt, the model's "
                f"vocabulary ends at {self.runtime.vocabulary - 1}: it belongs to another model; export again"
            )
        return ids

    def _room(self, ids: Sequence[int], wanted: int) -> int:
        """Return how many of the wanted new tokens fit in the model's context.

        Raises:
            InputError: There is no token, or none fits.
        """
        if not ids:
            raise InputError("the prompt has no token; give at least one character")
        limit = self.runtime.exported.manifest.get("context_length")
        if limit and len(ids) >= limit:
            raise InputError(f"the prompt has {len(ids)} tokens, the model's context is {limit}; give a shorter prompt")
        return min(wanted, limit - len(ids)) if limit else wanted

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        emit: Callable[[str], None] = lambda piece: None,
    ) -> Generated:
        """Continue a prompt.

        Args:
            prompt: Text.
            max_tokens: Maximum number of new tokens.
            sampling: How tokens are chosen; greedily when None.
            stop: Strings that end the text, special tokens among them; they are not part of it.
            emit: Called with each piece of text as soon as it is final.

        Returns:
            The text and its figures; an interrupt (Ctrl-C) ends the text, it does not raise.
        """
        sampling = sampling or Sampling()
        sampling.check()
        ids = self.encode(prompt)
        if ids[:2] == [self.tokenizer.bos_token_id] * 2:
            log.warning("the tokenizer adds the token that begins a text, so the model reads it twice; leave it out")
        result = Generated(prompt_tokens=len(ids))
        room = self._room(ids, max_tokens)
        try:
            self._loop(ids, room, sampling, list(stop), emit, result)
        except KeyboardInterrupt:
            result.stopped = "interrupted"
        else:
            if result.stopped == "length" and room < max_tokens:
                result.stopped = "context"
        return result

    def continue_ids(self, ids: list[int], max_tokens: int) -> list[int]:
        """Return the greedy continuation of ids, up to the end of text or of the model's context.

        Args:
            ids: Ids of a prompt.
            max_tokens: Maximum number of new tokens.

        Raises:
            InputError: There is no id, they fill the model's context, or one is outside its vocabulary.
        """
        result = Generated()
        self._loop(ids, self._room(ids, max_tokens), Sampling(), [], lambda piece: None, result)
        return result.tokens

    def _loop(
        self,
        ids: list[int],
        room: int,
        sampling: Sampling,
        stop: list[str],
        emit: Callable[[str], None],
        result: Generated,
    ) -> None:
        random = np.random.default_rng(sampling.seed)
        stop_tokens = special_stops(self.tokenizer, stop)
        cache = self.runtime.empty_cache(1)
        new, sent = ids, 0
        started = time.monotonic()
        while len(result.tokens) < room:
            mask = np.ones((1, cache.length + len(new)), dtype=np.int64)
            step = self.runtime.step(np.array([new]), mask, cache, last=True)
            result.count(step)
            result.kv_saved = cache.saved()
            token = choose(step.logits[0, -1], sampling, random)
            now = time.monotonic()
            if not result.tokens:
                result.prefill_seconds = now - started
            result.decode_seconds = now - started - result.prefill_seconds
            if token in self.end or token in stop_tokens:
                result.stopped = "end" if token in self.end else "stop"
                break
            result.tokens.append(token)
            new = [token]
            text = self._text_after(ids[-_TAIL:], result.tokens)
            cut = min((text.find(mark) for mark in stop if mark and mark in text), default=-1)
            if cut >= 0:
                text, result.stopped = text[:cut], "stop"
            sure = len(text) if cut >= 0 else _sure(text, stop)
            emit(text[sent:sure])
            sent, result.text = max(sent, sure), text
            if cut >= 0:
                break
        emit(result.text[sent:])

    def _text_after(self, before: list[int], new: list[int]) -> str:
        """Return the text of new tokens after others: some tokenizers drop a space that begins a text."""
        start = self.tokenizer.decode(before, skip_special_tokens=True)
        whole = self.tokenizer.decode(before + new, skip_special_tokens=True)
        if whole.startswith(start):
            return whole[len(start) :]
        # The last character of the prompt was half a character.
        return self.tokenizer.decode(new, skip_special_tokens=True)


def choose(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """Choose a token from logits [vocabulary].

    Raises:
        IrcError: A logit is NaN or infinite.
    """
    if not math.isfinite(logits.max()):
        raise IrcError(
            "the model's logits are not finite numbers; if it was exported in fp16, which holds none above 65,504, "
            "export it in bf16 or fp32"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    chances = np.exp(scaled[order] - scaled[order[0]])
    chances /= chances.sum()
    if sampling.top_p < 1:
        keep = int(np.searchsorted(np.cumsum(chances), sampling.top_p)) + 1
        order, chances = order[:keep], chances[:keep] / chances[:keep].sum()
    return int(random.choice(order, p=chances))


def _check_text(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid UTF-8 (character {error.start}); give text") from error


def special_stops(tokenizer: Any, stop: Sequence[str]) -> frozenset[int]:
    """Return the ids of the stop strings that are special tokens, which no decoded text contains.

    Raises:
        InputError: A stop string is not valid text.
    """
    for mark in stop:
        _check_text(mark, f"the stop string {mark!a:.80}")
    alone = [tokenizer.encode(mark, add_special_tokens=False) for mark in stop]
    return frozenset(ids[0] for ids in alone if len(ids) == 1 and not tokenizer.decode(ids, skip_special_tokens=True))


def _sure(text: str, stop: Sequence[str]) -> int:
    """Return how much of a text is final: it ends neither in half a character nor in the beginning of a stop string."""
    sure = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    for mark in stop:
        for size in range(min(len(mark) - 1, sure), 0, -1):
            if text[:sure].endswith(mark[:size]):
                sure = min(sure, sure - size)
                break
    return sure


def _warn_of_ignored(folder: Path) -> None:
    """Warn of settings in generation_config.json that change the tokens in transformers, and here do nothing."""
    path = folder / "generation_config.json"
    stated = read_json(path) if path.is_file() else {}  # readable: the tokens that end a text were read from it
    ignored = [f"{key} {stated[key]}" for key, usual in _CHANGES_TOKENS.items() if stated.get(key) not in (None, usual)]
    if ignored:
        log.warning("%s: not used here, unlike in transformers: %s", path, ", ".join(ignored)[:200])


def _end_tokens(folder: Path, eos: int | None) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, and those of generation_config.json or else config.json."""
    stated: Any = None
    for path in (folder / "generation_config.json", folder / "config.json"):
        try:
            stated = read_json(path).get("eos_token_id") if stated is None and path.is_file() else stated
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: damaged ({first_line(error)}); export again") from error
        ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
        if any(type(end) is not int for end in ends):
            raise InputError(f"{path}: damaged (eos_token_id is {str(stated)[:80]!r}); export again")
    return frozenset(ends if eos is None else [*ends, eos])
