"""Measures perplexity, realized sparsity and recoverability on text, dense and routed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from irc.dtypes import short_name
from irc.errors import IrcError
from irc.model.flops import flops_ratio
from irc.model.head import token_losses
from irc.model.modules import Mode, Record
from irc.model.routed import RoutedForCausalLM
from irc.progress import Progress
from irc.training.lora import adapters_off

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Evaluation:
    """Figures on one text.

    Attributes:
        tokens: Number of predicted tokens.
        dense: Perplexity of the base, with every unit executed and without LoRA adapters.
        routed: Perplexity under deterministic routing; None for a plain model.
        keep: Share of tokens that each unit executes.
        recoverability: Mean cosine between forecaster(x) and unit(x) by unit, with every unit executed.
        flops_ratio: Matrix-multiply FLOPs of the routed model over those of the dense model.
        seconds: Seconds taken.
    """

    tokens: int
    dense: float
    routed: float | None
    keep: dict[str, float]
    recoverability: dict[str, float]
    flops_ratio: float
    seconds: float

    def sparsity(self, model: RoutedForCausalLM, kind: str | None = None) -> float:
        """Return the share of approximated (token, unit) pairs, over all units or over the units of one kind."""
        shares = [1 - self.keep[unit.name] for unit in model.units if kind in (None, unit.kind)]
        return sum(shares) / len(shares) if shares else 0.0


@torch.no_grad()
def evaluate_routed(model: RoutedForCausalLM, text: torch.Tensor, progress: Progress) -> tuple[float, dict[str, float]]:
    """Measure a model under deterministic routing.

    Args:
        model: Rewritten model.
        text: int64 [windows, length].
        progress: Updated after each batch.

    Returns:
        The perplexity, and the share of tokens that each unit executes.
    """
    model.train(False)
    totals = _Totals(model)
    rows = max(1, _BATCH_TOKENS // text.shape[1])
    for index in range(0, len(text), rows):
        batch = text[index : index + rows].to(model.device)
        totals.add_routed(batch, torch.ones_like(batch))
        progress.update(min(index + rows, len(text)), routed_ppl=totals.perplexity("route"))
    return totals.perplexity("route"), totals.keep()


@torch.no_grad()
def evaluate(
    model: RoutedForCausalLM, text: torch.Tensor, progress: Progress, attention_mask: torch.Tensor | None = None
) -> Evaluation:
    """Evaluate a model on windows of text.

    Args:
        model: Plain or rewritten.
        text: int64 [windows, length].
        progress: Updated after each batch.
        attention_mask: [windows, length], 0 on padding; no padding if None.

    Returns:
        Figures over all tokens that are not padding.
    """
    started = time.monotonic()
    model.train(False)
    totals = _Totals(model)
    rows = max(1, _BATCH_TOKENS // text.shape[1])
    for index in range(0, len(text), rows):
        batch = text[index : index + rows].to(model.device)
        mask = torch.ones_like(batch)
        if attention_mask is not None:
            mask = attention_mask[index : index + rows].to(model.device)
        totals.add_dense(batch, mask)
        if model.spec:
            totals.add_routed(batch, mask)
        progress.update(min(index + rows, len(text)), **totals.figures())
    return totals.result(text.shape[1], time.monotonic() - started)


class _Totals:
    """Sums over all batches so far."""

    def __init__(self, model: RoutedForCausalLM) -> None:
        self.model = model
        self.loss: dict[Mode, float] = {"execute": 0.0, "route": 0.0}
        self.predicted: dict[Mode, int] = {"execute": 0, "route": 0}
        self.tokens: dict[Mode, int] = {"execute": 0, "route": 0}
        self.executed = {unit.name: 0.0 for unit in model.units}
        self.cosine = {unit.name: 0.0 for unit in model.units}

    def add_dense(self, batch: torch.Tensor, mask: torch.Tensor) -> None:
        """Run a batch with every unit executed, and once more without LoRA adapters if the model has any."""
        tape, states = self._run("execute", batch, mask, measure_error=True)
        for name, record in tape.items():
            assert record.cosine is not None
            self.cosine[name] += record.cosine[mask.bool()].double().sum().item()
        with adapters_off(self.model):
            if self.model.lora is not None:
                _, states = self._run("execute", batch, mask)
            self._count("execute", states, batch, mask)

    def add_routed(self, batch: torch.Tensor, mask: torch.Tensor) -> None:
        """Run a batch of a rewritten model under deterministic routing."""
        tape, states = self._run("route", batch, mask)
        for name, record in tape.items():
            self.executed[name] += record.execute[mask.bool()].double().sum().item()
        self._count("route", states, batch, mask)

    def _run(
        self, mode: Mode, batch: torch.Tensor, mask: torch.Tensor, measure_error: bool = False
    ) -> tuple[dict[str, Record], torch.Tensor]:
        tape: dict[str, Record] = {}
        with self.model.control.using(mode=mode, tape=tape, measure_error=measure_error):
            return tape, self.model.states(batch, mask)

    def _count(self, mode: Mode, states: torch.Tensor, batch: torch.Tensor, mask: torch.Tensor) -> None:
        flat, targets = states[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        losses = token_losses(self.model.logits, flat, targets, self.model.config.vocab_size)
        counted = (mask[:, 1:].bool() & mask[:, :-1].bool()).flatten()
        self.loss[mode] += losses[counted].double().sum().item()
        if not math.isfinite(self.loss[mode]):
            raise IrcError(
                f"{self.model.base.name}: its loss is {self.loss[mode]} in {short_name(self.model.dtype)}, because a "
                "weight or an activation is not finite; load it as bf16 or fp32, or fix its weights",
                options=("dtype",),
            )
        self.predicted[mode] += int(counted.sum())
        self.tokens[mode] += int(mask.bool().sum())

    def figures(self) -> dict[str, float]:
        """Return the figures for the progress bar."""
        figures = {"dense_ppl": self.perplexity("execute")}
        if self.model.spec:
            keep = self.keep()
            figures["routed_ppl"] = self.perplexity("route")
            figures["sparsity"] = 1 - sum(keep.values()) / max(1, len(keep))
        return figures

    def perplexity(self, mode: Mode) -> float:
        """Return the perplexity of all batches so far."""
        return math.exp(min(700.0, self.loss[mode] / max(1, self.predicted[mode])))

    def keep(self) -> dict[str, float]:
        """Return the share of tokens that each unit executes; 1 in a plain model."""
        tokens = self.tokens["route"]
        return {name: count / tokens if tokens else 1.0 for name, count in self.executed.items()}

    def result(self, context: int, seconds: float) -> Evaluation:
        """Return the figures over all batches.

        Args:
            context: Tokens per window, for the FLOPs.
            seconds: Seconds taken.
        """
        routed, keep = self.model.spec is not None, self.keep()
        tokens = max(1, self.tokens["execute"])
        return Evaluation(
            tokens=self.predicted["execute"],
            dense=self.perplexity("execute"),
            routed=self.perplexity("route") if routed else None,
            keep=keep,
            recoverability={name: total / tokens for name, total in self.cosine.items()} if routed else {},
            flops_ratio=flops_ratio(self.model, keep, context),
            seconds=seconds,
        )
