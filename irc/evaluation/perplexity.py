"""Measures fidelity, perplexity, realized sparsity and recoverability on text, dense and routed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from irc.dtypes import short_name
from irc.errors import IrcError
from irc.evaluation.fidelity import Fidelity, fidelity_of
from irc.model.flops import flops_ratio
from irc.model.head import divergence, log_probabilities, parts
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
        fidelity: How close the routed predictions are to the dense ones; None for a plain model.
        keep: Share of tokens that each unit executes.
        recoverability: Mean cosine between forecaster(x) and unit(x) by unit, with every unit executed.
        flops_ratio: Matrix-multiply FLOPs of the routed model over those of the dense model.
        seconds: Seconds taken.
    """

    tokens: int
    dense: float
    routed: float | None
    fidelity: Fidelity | None
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
        totals.add(batch, mask)
        progress.update(min(index + rows, len(text)), **totals.figures())
    return totals.result(text.shape[1], time.monotonic() - started)


class _Totals:
    """Sums over all batches so far."""

    def __init__(self, model: RoutedForCausalLM) -> None:
        self.model = model
        self.loss: dict[Mode, float] = {"execute": 0.0, "route": 0.0}
        self.predicted = 0
        self.tokens = 0
        self.executed = {unit.name: 0.0 for unit in model.units}
        self.cosine = {unit.name: 0.0 for unit in model.units}
        self.divergence: list[torch.Tensor] = []
        self.same: list[torch.Tensor] = []

    def add(self, batch: torch.Tensor, mask: torch.Tensor) -> None:
        """Run a batch with every unit executed, and that of a rewritten model also under deterministic routing."""
        dense = self._dense_states(batch, mask)
        if self.model.spec is None:
            self._count({"execute": dense}, batch, mask)
        else:
            self._count({"execute": dense, "route": self._routed_states(batch, mask)}, batch, mask)

    def add_routed(self, batch: torch.Tensor, mask: torch.Tensor) -> None:
        """Run a batch of a rewritten model under deterministic routing alone."""
        self._count({"route": self._routed_states(batch, mask)}, batch, mask)

    def _dense_states(self, batch: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the states of the base; forecasts are compared with units that have their LoRA adapters."""
        tape, states = self._run("execute", batch, mask, measure_error=True)
        for name, record in tape.items():
            assert record.cosine is not None
            self.cosine[name] += record.cosine[mask.bool()].double().sum().item()
        if self.model.lora is not None:
            with adapters_off(self.model):
                _, states = self._run("execute", batch, mask)
        return states

    def _routed_states(self, batch: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tape, states = self._run("route", batch, mask)
        for name, record in tape.items():
            self.executed[name] += record.execute[mask.bool()].double().sum().item()
        return states

    def _run(
        self, mode: Mode, batch: torch.Tensor, mask: torch.Tensor, measure_error: bool = False
    ) -> tuple[dict[str, Record], torch.Tensor]:
        tape: dict[str, Record] = {}
        with self.model.control.using(mode=mode, tape=tape, measure_error=measure_error):
            return tape, self.model.states(batch, mask)

    def _count(self, states: dict[Mode, torch.Tensor], batch: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the losses of the predicted tokens, and how the two modes differ if both were run."""
        counted = (mask[:, 1:].bool() & mask[:, :-1].bool()).flatten()
        targets = batch[:, 1:].flatten()[counted]
        chosen = {mode: found[:, :-1].flatten(0, 1)[counted] for mode, found in states.items()}
        for rows in parts(targets, self.model.config.vocab_size):
            predicted = {mode: log_probabilities(self.model.logits(found[rows])) for mode, found in chosen.items()}
            for mode, found in predicted.items():
                self.loss[mode] -= found.gather(-1, targets[rows, None]).double().sum().item()
                self._check_finite(self.loss[mode])
            if len(predicted) == 2:
                dense, routed = predicted["execute"], predicted["route"]
                self.same.append((dense.argmax(-1) == routed.argmax(-1)).cpu())
                self.divergence.append(divergence(dense, routed).cpu())
        self.predicted += len(targets)
        self.tokens += int(mask.bool().sum())

    def _check_finite(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        half = self.model.dtype == torch.float16
        cause = "numbers above 65,504: load it as bf16 or fp32" if half else "weights that are damaged: fix them"
        found = f"{loss} in {short_name(self.model.dtype)}"
        raise IrcError(
            f"{self.model.base.name}: its loss is {found}; it has {cause}", options=("dtype",) if half else ()
        )

    def figures(self) -> dict[str, float]:
        """Return the figures for the progress bar."""
        figures = {"dense_ppl": self.perplexity("execute")}
        if self.model.spec:
            keep = self.keep()
            figures["routed_ppl"] = self.perplexity("route")
            figures["kl"] = torch.cat(self.divergence).mean().item()
            figures["sparsity"] = 1 - sum(keep.values()) / max(1, len(keep))
        return figures

    def perplexity(self, mode: Mode) -> float:
        """Return the perplexity of all batches so far."""
        return math.exp(min(700.0, self.loss[mode] / max(1, self.predicted)))

    def keep(self) -> dict[str, float]:
        """Return the share of tokens that each unit executes; 1 in a plain model."""
        routed = self.model.spec is not None and self.tokens
        return {name: count / self.tokens if routed else 1.0 for name, count in self.executed.items()}

    def result(self, context: int, seconds: float) -> Evaluation:
        """Return the figures over all batches.

        Args:
            context: Tokens per window, for the FLOPs.
            seconds: Seconds taken.
        """
        routed, keep = self.model.spec is not None, self.keep()
        return Evaluation(
            tokens=self.predicted,
            dense=self.perplexity("execute"),
            routed=self.perplexity("route") if routed else None,
            fidelity=fidelity_of(torch.cat(self.divergence), torch.cat(self.same)) if routed else None,
            keep=keep,
            recoverability={name: total / max(1, self.tokens) for name, total in self.cosine.items()} if routed else {},
            flops_ratio=flops_ratio(self.model, keep, context),
            seconds=seconds,
        )
