"""Times models in turns, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from irc.bench.llama_cpp import LlamaCppModel
from irc.bench.timed_models import Ids, TimedModel


@dataclass(frozen=True)
class Timing:
    """The measured times of one model.

    Attributes:
        seconds: Seconds of each round.
    """

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """The distance between the quartiles, over the median."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(high - low) / self.median


@dataclass(frozen=True)
class Workload:
    """The tokens that every model reads in a round, and the gates that routed models follow.

    Attributes:
        prompt: int64 [batch, tokens]; read at once and timed.
        past: int64 [batch, past]; read before decoding and not timed.
        tokens: int64 [steps, batch, 1]; read one after the other.
        prompt_gates: What routed models execute of the prompt, bool [units, batch, tokens]; None for their own routes.
        token_gates: What routed models execute of the tokens, bool [steps, units, batch, 1]; None for their own routes.
    """

    prompt: Ids
    past: Ids
    tokens: Ids
    prompt_gates: NDArray[np.bool_] | None
    token_gates: NDArray[np.bool_] | None

    def gates_of_step(self, step: int) -> NDArray[np.bool_] | None:
        """Return the gates of one step of decoding, bool [units, batch, 1]."""
        return None if self.token_gates is None else self.token_gates[step]


def prefill_in_turns(models: Mapping[str, TimedModel], workload: Workload, rounds: int) -> dict[str, Timing]:
    """Time reading the prompt. The models take turns; a warm-up round is not counted."""
    batch = len(workload.prompt)
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            seconds, _ = _timed_step(model, workload.prompt, model.empty(batch), workload.prompt_gates)
            taken[name].append(seconds)
    return {name: Timing(seconds[1:]) for name, seconds in taken.items()}


def decode_in_turns(models: Mapping[str, TimedModel], workload: Workload, rounds: int) -> dict[str, Timing]:
    """Time steps of one token per sequence. The models take turns at each step; a warm-up round is not counted.

    Returns:
        For each model, the seconds of all steps of a round.
    """
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        states = {name: state_after_past(model, workload) for name, model in models.items()}
        totals = dict.fromkeys(models, 0.0)
        for index, token in enumerate(workload.tokens):
            for name, model in models.items():
                seconds, states[name] = _timed_step(model, token, states[name], workload.gates_of_step(index))
                totals[name] += seconds
        for name, total in totals.items():
            taken[name].append(total)
    return {name: Timing(seconds[1:]) for name, seconds in taken.items()}


def state_after_past(model: TimedModel, workload: Workload) -> object:
    """Let a model read the past with every unit executed; return its state."""
    gates = workload.prompt_gates
    execute = None if gates is None else np.ones((len(gates), *workload.past.shape), bool)
    return model.step(workload.past, model.empty(len(workload.past)), execute)


def _timed_step(model: TimedModel, ids: Ids, state: object, execute: NDArray[np.bool_] | None) -> tuple[float, object]:
    """Return the seconds of one step, and the new state. llama.cpp times itself, without its server's overhead."""
    started = time.perf_counter()
    state = model.step(ids, state, execute)
    seconds = time.perf_counter() - started
    return model.seconds if isinstance(model, LlamaCppModel) else seconds, state
