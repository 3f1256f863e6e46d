"""Opens the dense model in other runtimes, by the name that `irc bench --peers` takes."""

from __future__ import annotations

from pathlib import Path

from irc.bench.llama_cpp import LlamaCppModel, threads_of_cores
from irc.bench.llama_cpp_file import llama_cpp_file
from irc.bench.models import ModelPair, genai_export
from irc.bench.precision import Precision
from irc.bench.timed_models import GenaiModel, TimedModel, TransformersModel

OTHER_RUNTIMES = ("hf-eager", "hf-compiled", "genai", "llama.cpp")  # they run the dense model
PEERS = ("static", *OTHER_RUNTIMES)


def open_peer(name: str, pair: ModelPair, work: Path, provider: str, precision: Precision, context: int) -> TimedModel:
    """Open the dense model of a pair in another runtime.

    Args:
        name: One of `OTHER_RUNTIMES`.
        pair: The model.
        work: Folder to write to.
        provider: cpu or cuda.
        precision: Of weights, and of everything else.
        context: Longest text, in tokens.

    Raises:
        InputError: A package is not installed, or the runtime does not take the model.
    """
    if name == "genai":
        folder = work / "genai"
        if not folder.exists():
            genai_export(pair.base, work, provider, precision)
        return GenaiModel(folder, provider, precision.computed)
    if name == "llama.cpp":
        file = llama_cpp_file(pair.base, pair.model.base.name, work, precision)
        return LlamaCppModel(file, context, threads_of_cores())
    return TransformersModel(pair.base, precision.computed, provider, compiled=name == "hf-compiled")
