"""The dense model in llama.cpp, through the server inside the package xllamacpp.

The package offers no single passes, only requests. A request whose prompt is known except for its end, with one token
to predict, makes the server read that end alone and compute the logits of its last token: a prefill or a step of
decoding. The server's own clock (`timings.prompt_ms`) leaves out the request itself.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irc.errors import InputError, IrcError

_SPARE = 64  # tokens of context for what the server predicts


def check_llama_cpp(provider: str, batches: Sequence[int]) -> None:
    """Refuse what the peer llama.cpp cannot do, before anything is written.

    Args:
        provider: Of the other models: cpu or cuda.
        batches: Batch sizes to time.

    Raises:
        InputError: A package is missing, the models run on a GPU, or a batch has several sequences.
    """
    for package in ("xllamacpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"peer llama.cpp needs the package {package}; install it with: "
                "pip install 'informed-routing-compiler[llamacpp]'",
                options=("peers",),
            )
    if provider != "cpu":
        raise InputError("peer llama.cpp is timed on the CPU; add --provider cpu or leave it out", options=("peers",))
    if any(batch != 1 for batch in batches):
        raise InputError("peer llama.cpp is timed at batch 1; set other batches without it", options=("peers",))


def threads_of_cores() -> int:
    """Return the number of physical cores that this process may use.

    Threads of llama.cpp wait for each other spinning, so more than cores cost much.
    """
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return len(cores)


class LlamaCppModel:
    """A GGUF file in llama.cpp, one sequence at a time.

    Its state is the list of the tokens read so far. The server keeps one cache; a state that it does not hold, because
    another was used in between, is an error.

    Args:
        file: The GGUF file.
        context: Longest text, in tokens.
        threads: Threads for prompts and for single tokens.

    Raises:
        InputError: llama.cpp does not take the file.
    """

    def __init__(self, file: Path, context: int, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), context + _SPARE, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_ram_mib, params.fit_params, params.verbosity = 0, False, -1
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # the binding raises plain RuntimeError and the like
            raise InputError(f"{file}: llama.cpp does not load it ({error})") from error
        self.seconds = 0.0

    def empty(self, batch: int) -> list[int]:
        """Return the state before the first token."""
        if batch != 1:
            raise InputError("peer llama.cpp is timed at batch 1")
        return []

    def step(self, ids: NDArray[np.int64], state: list[int], execute: NDArray[np.bool_] | None) -> list[int]:
        """Read tokens and compute the logits of the last one; `seconds` is then what the server measured.

        Raises:
            IrcError: The server read another number of tokens than were given.
        """
        tokens = [*state, *(int(token) for token in ids[0])]
        self.ask(tokens, cached=bool(state))
        return tokens

    def ask(self, tokens: list[int], cached: bool, **more: Any) -> dict[str, Any]:
        """Let the server read tokens and predict one greedily; return its answer.

        Args:
            tokens: The whole prompt.
            cached: Whether all of it but what is new is taken from the cache.
            more: Further fields of the request.
        """
        request = {"prompt": tokens, "n_predict": 1, "cache_prompt": cached, "samplers": ["top_k"], "top_k": 1}
        answer: dict[str, Any] = self._server.handle_completions(request | more)
        timings = answer.get("timings")
        if timings is None:
            raise IrcError(f"llama.cpp did not answer with timings: {answer}")
        if timings["prompt_n"] + timings["cache_n"] != len(tokens) or bool(timings["cache_n"]) != cached:
            raise IrcError(f"llama.cpp did not read the tokens that were new: {timings}")
        self.seconds = timings["prompt_ms"] / 1e3
        return answer
