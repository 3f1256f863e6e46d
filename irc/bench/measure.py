"""Times contenders in turns: what the machine does meanwhile meets them all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from irc.bench.timed_models import Contender, Ids


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, over all rounds.

    Attributes:
        seconds: Of each round.
    """

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Distance between the quartiles, over the median."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(high - low) / self.median


@dataclass(frozen=True)
class Work:
    """What every contender does in a round.

    Attributes:
        prompt: int64 [batch, tokens], read at once and timed.
        before: int64 [batch, past], read first in decoding and not timed.
        tokens: int64 [steps, batch, 1], read one after the other.
        gates: bool [units, batch, prompt tokens], what routed models execute of the prompt; None for their own routes.
        steps: bool [steps, units, batch, 1], the same of the tokens.
    """

    prompt: Ids
    before: Ids
    tokens: Ids
    gates: NDArray[np.bool_] | None
    steps: NDArray[np.bool_] | None


def prefill_in_turns(contenders: Mapping[str, Contender], work: Work, rounds: int) -> dict[str, Timing]:
    """Time reading the prompt, one contender after the other; a first round does not count."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, contender in contenders.items():
            taken[name].append(_seconds(contender, work.prompt, contender.empty(len(work.prompt)), work.gates)[0])
    return {name: Timing(seconds[1:]) for name, seconds in taken.items()}


def decode_in_turns(contenders: Mapping[str, Contender], work: Work, rounds: int) -> dict[str, Timing]:
    """Time steps of one token a sequence, the contenders taking turns at each; seconds are of all steps of a round."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        states = {name: begun(contender, work) for name, contender in contenders.items()}
        seconds = dict.fromkeys(contenders, 0.0)
        for index, token in enumerate(work.tokens):
            execute = None if work.steps is None else work.steps[index]
            for name, contender in contenders.items():
                passed, states[name] = _seconds(contender, token, states[name], execute)
                seconds[name] += passed
        for name, value in seconds.items():
            taken[name].append(value)
    return {name: Timing(seconds[1:]) for name, seconds in taken.items()}


def begun(contender: Contender, work: Work) -> object:
    """Return the state after the past, in which every unit executes."""
    execute = None if work.gates is None else np.ones((len(work.gates), *work.before.shape), bool)
    return contender.step(work.before, contender.empty(len(work.before)), execute)


def _seconds(contender: Contender, ids: Ids, state: object, execute: NDArray[np.bool_] | None) -> tuple[float, object]:
    started = time.perf_counter()
    state = contender.step(ids, state, execute)
    return time.perf_counter() - started, state
