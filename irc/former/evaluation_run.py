"""Formerly `irc.evaluation_run`, with the arguments of version 0.1.

Now `irc.bundle.loading.open_model` and `irc.evaluation.run.run_evaluation`, which take a `ModelSource`.
"""

from __future__ import annotations

from typing import Any

from irc.bundle.loading import open_model as _open_model
from irc.bundle.source import ModelSource
from irc.evaluation.run import TextChoice
from irc.evaluation.run import run_evaluation as _run_evaluation
from irc.model.routed import RoutedForCausalLM
from irc.progress import ProgressFactory

_OF_TEXT = ("data", "split", "tokens", "seq_len")
_SWEEPS = ("kv_thresholds", "sparsities")


def open_model(name: str, **options: Any) -> RoutedForCausalLM:
    """Open a bundle or a plain model.

    Args:
        name: Bundle, model folder, hub id, or demo.
        **options: `base`, `dtype`, `device`, `key_policy`, `sparsity`, `ask_hub`: the fields of `ModelSource`.
    """
    return _open_model(ModelSource(name, **options))


def run_evaluation(name: str, progress: ProgressFactory, **options: Any) -> dict[str, Any]:
    """Evaluate a bundle or a plain model.

    Args:
        name: Bundle, model folder, hub id, or demo.
        progress: Makes progress bars.
        **options: `data`, `split`, `tokens` and `seq_len` (the fields of `TextChoice`), `kv_thresholds`, `sparsities`,
            and the fields of `ModelSource`.
    """
    text = {key: options.pop(key) for key in _OF_TEXT if key in options}
    sweeps = {key: options.pop(key) for key in _SWEEPS if key in options}
    return _run_evaluation(ModelSource(name, **options), progress, TextChoice(**text), **sweeps)


__all__ = ["open_model", "run_evaluation"]
