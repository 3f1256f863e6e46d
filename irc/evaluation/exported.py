"""Measures an ONNX folder against the dense model in fp32: what skipping costs beside what quantizing costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from irc.errors import IrcError
from irc.evaluation.fidelity import fidelity_of
from irc.evaluation.texts import NamedText
from irc.model.flops import flops_ratio
from irc.model.head import divergence, log_probabilities, parts
from irc.model.modules import Mode
from irc.model.routed import RoutedForCausalLM
from irc.progress import Progress, ProgressFactory
from irc.runtime.session import Runtime
from irc.training.lora import adapters_off

Predict = Callable[[torch.Tensor], torch.Tensor]
"""From the ids of a window, int64 [1, tokens], to logits, [tokens, vocabulary]."""


@dataclass
class _Side:
    """A model that is compared with the dense one, and its sums so far.

    Attributes:
        name: Such as `routed int4`.
        predict: Its logits.
        loss: Sum of the losses, in nats.
        divergence: KL(dense || this) of the predicted tokens.
        same: Whether both find the same token likeliest.
    """

    name: str
    predict: Predict
    loss: float = 0.0
    divergence: list[torch.Tensor] = field(default_factory=list)
    same: list[torch.Tensor] = field(default_factory=list)


class FolderFigures:
    """Compares an ONNX folder, and what lies between it and the dense model, with the dense model.

    Args:
        runtime: Of the folder.
        source: What it was exported from, in fp32.
        quantized: The same with the folder's quantized weights; None if it has none.
    """

    def __init__(self, runtime: Runtime, source: RoutedForCausalLM, quantized: RoutedForCausalLM | None) -> None:
        self._runtime, self._source, self._quantized = runtime, source, quantized
        how = runtime.exported.quantization
        kind = runtime.exported.dtype if how is None else how.name
        routed = source.spec is not None
        self._between: list[tuple[str, Predict]] = []
        if routed and kind != "fp32":
            self._between.append(("routed fp32", _predict(source, "route")))
        if routed and quantized is not None and source.lora is None:  # adapters would be merged into the blocks
            self._between.append((f"dense {kind}", _predict(quantized, "execute")))
        self.name = f"{'routed' if routed else 'dense'} {kind}"

    @torch.no_grad()
    def measure(self, text: NamedText, progress: Progress) -> dict[str, Any]:
        """Return the figures of a text.

        Args:
            text: Its windows are read one by one.
            progress: Updated after each window.
        """
        executed = {decision.unit: 0 for decision in self._runtime.exported.decisions}
        sides = [_Side(name, predict) for name, predict in (*self._between, (self.name, self._onnx(executed)))]
        dense, dense_loss, predicted = _predict(self._source, "execute"), 0.0, 0
        for index, window in enumerate(text.windows):
            ids = window[None]
            logits = dense(ids)[:-1]
            others = [side.predict(ids)[:-1] for side in sides]
            for rows in parts(logits, logits.shape[-1]):
                targets = ids[0, 1:][rows, None]
                expected = log_probabilities(logits[rows])
                dense_loss -= expected.gather(-1, targets).double().sum().item()
                for side, found in zip(sides, others, strict=True):
                    predictions = log_probabilities(found[rows])
                    side.loss -= predictions.gather(-1, targets).double().sum().item()
                    side.same.append(expected.argmax(-1) == predictions.argmax(-1))
                    side.divergence.append(divergence(expected.clone(), predictions))
            predicted += len(window) - 1
            progress.update(index + 1, kl=torch.cat(sides[-1].divergence).mean().item())
        for side in sides:
            if not math.isfinite(side.loss):
                raise IrcError(
                    f"{self._runtime.exported.folder}: {side.name} has a loss of {side.loss}; export in fp32"
                )
        perplexity = _perplexity(dense_loss, predicted)
        *between, own = [_figures(side, perplexity, predicted) for side in sides]
        tokens = text.windows.numel()
        keep = {unit: count / tokens for unit, count in executed.items()}
        share = 1 - sum(keep.values()) / len(keep) if keep else 0.0
        ratio = flops_ratio(self._source, keep, text.windows.shape[1]) if keep else 1.0
        return {
            **{"tokens": predicted, "fidelity": own["fidelity"], "perplexity": own["perplexity"]},
            **{"sparsity": {"realized": share}, "flops_ratio": ratio, "between": between},
        }

    def _onnx(self, executed: dict[str, int]) -> Predict:
        """Return what the folder itself predicts; it counts the tokens that each unit executes."""

        def predict(ids: torch.Tensor) -> torch.Tensor:
            runtime = self._runtime
            step = runtime.step(ids.numpy(), np.ones(ids.shape, np.int64), runtime.empty_cache(1))
            for unit, execute in zip(executed, step.execute, strict=True):
                executed[unit] += int(execute.sum())
            return torch.from_numpy(step.logits[0])

        return predict


def measure_folder(
    figures: FolderFigures, main: NamedText, further: list[NamedText], progress: ProgressFactory
) -> dict[str, Any]:
    """Return the figures of the main text, and those of further texts under `texts`."""
    started = time.monotonic()
    found = []
    for text in (main, *further):
        with progress(text.name, len(text.windows)) as bar:
            found.append({"name": text.name, **figures.measure(text, bar)})
    own = {key: value for key, value in found[0].items() if key != "name"}
    return {"side": figures.name, **own, "texts": found[1:], "seconds": {"evaluate": time.monotonic() - started}}


def _predict(model: RoutedForCausalLM, mode: Mode) -> Predict:
    model.train(False)

    def predict(ids: torch.Tensor) -> torch.Tensor:
        plain = adapters_off(model) if mode == "execute" else nullcontext()
        with plain, model.control.using(mode=mode, tape=None):
            return model.logits(model.states(ids))[0].float()

    return predict


def _figures(side: _Side, dense: float, predicted: int) -> dict[str, Any]:
    routed = _perplexity(side.loss, predicted)
    return {
        "name": side.name,
        "fidelity": asdict(fidelity_of(torch.cat(side.divergence), torch.cat(side.same))),
        "perplexity": {"dense": dense, "routed": routed, "ratio": routed / dense},
    }


def _perplexity(loss: float, predicted: int) -> float:
    return math.exp(min(700.0, loss / max(1, predicted)))
