"""Perplexity, realized sparsity and recoverability on text, dense and routed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from irc.flops import flops_ratio
from irc.modules import Mode, Record
from irc.routed import RoutedForCausalLM
from irc.train import Progress

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Evaluation:
    """Figures of one text.

    Attributes:
        tokens: Tokens that were predicted.
        dense: Perplexity with every unit executed.
        routed: Perplexity under deterministic routing; None for a plain model.
        keep: Share of executed tokens of every unit.
        recoverability: Mean cosine between forecaster(x) and unit(x), every unit executed.
        flops_ratio: Routed over dense matrix-multiply FLOPs.
        seconds: Time taken.
    """

    tokens: int
    dense: float
    routed: float | None
    keep: dict[str, float]
    recoverability: dict[str, float]
    flops_ratio: float
    seconds: float

    def sparsity(self, model: RoutedForCausalLM, kind: str | None = None) -> float:
        """Return the share of approximated (token, unit) pairs, of all units or of one kind."""
        shares = [1 - self.keep[unit.name] for unit in model.units if kind in (None, unit.kind)]
        return sum(shares) / len(shares) if shares else 0.0


@torch.no_grad()
def evaluate(
    model: RoutedForCausalLM, text: torch.Tensor, progress: Progress, attention_mask: torch.Tensor | None = None
) -> Evaluation:
    """Evaluate a model on windows of text.

    Args:
        model: Plain or rewritten.
        text: int64 [windows, length].
        progress: Told after every batch.
        attention_mask: [windows, length], 0 on padding, which counts nowhere; no padding when None.

    Returns:
        Perplexities and shares over real tokens alone.
    """
    started = time.monotonic()
    model.train(False)
    totals = _Totals(model)
    rows = max(1, _BATCH_TOKENS // text.shape[1])
    for index in range(0, len(text), rows):
        batch = text[index : index + rows].to(model.device)
        mask = (
            torch.ones_like(batch) if attention_mask is None else attention_mask[index : index + rows].to(model.device)
        )
        totals.add(batch, mask)
        progress.update(min(index + rows, len(text)), **totals.figures())
    return totals.result(text.shape[1], time.monotonic() - started)


class _Totals:
    """Running sums over batches."""

    def __init__(self, model: RoutedForCausalLM) -> None:
        self.model = model
        self.loss: dict[Mode, float] = {"execute": 0.0, "route": 0.0}
        self.predicted = 0
        self.tokens = 0
        self.executed = {unit.name: 0.0 for unit in model.units}
        self.cosine = {unit.name: 0.0 for unit in model.units}

    def add(self, batch: torch.Tensor, mask: torch.Tensor) -> None:
        """Run a batch densely and, for a rewritten model, routed."""
        real = mask.bool()
        self.tokens += int(real.sum())
        self.predicted += int((real[:, 1:] & real[:, :-1]).sum())
        tape = self._run("execute", batch, mask)
        for name, record in tape.items():
            assert record.cosine is not None
            self.cosine[name] += record.cosine[real].double().sum().item()
        for name, record in (self._run("route", batch, mask) if self.model.spec else {}).items():
            self.executed[name] += record.execute[real].double().sum().item()

    def _run(self, mode: Mode, batch: torch.Tensor, mask: torch.Tensor) -> dict[str, Record]:
        tape: dict[str, Record] = {}
        with self.model.control.using(mode=mode, tape=tape, measure_error=mode == "execute"):
            logits = self.model(input_ids=batch, attention_mask=mask, use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        counted = (mask[:, 1:].bool() & mask[:, :-1].bool()).flatten()
        self.loss[mode] += losses[counted].double().sum().item()
        return tape

    def figures(self) -> dict[str, float]:
        """What the progress bar shows."""
        shown = {"dense_ppl": self._perplexity("execute")}
        if self.model.spec:
            pairs = max(1, self.tokens * len(self.executed))
            shown |= {"routed_ppl": self._perplexity("route"), "sparsity": 1 - sum(self.executed.values()) / pairs}
        return shown

    def _perplexity(self, mode: Mode) -> float:
        return math.exp(min(700.0, self.loss[mode] / max(1, self.predicted)))

    def result(self, context: int, seconds: float) -> Evaluation:
        """Return the figures of all batches."""
        routed = self.model.spec is not None
        names = [unit.name for unit in self.model.units]
        keep = {name: self.executed[name] / self.tokens if routed else 1.0 for name in names}
        return Evaluation(
            tokens=self.predicted,
            dense=self._perplexity("execute"),
            routed=self._perplexity("route") if routed else None,
            keep=keep,
            recoverability={name: self.cosine[name] / self.tokens for name in names} if routed else {},
            flops_ratio=flops_ratio(self.model, keep, context),
            seconds=seconds,
        )
