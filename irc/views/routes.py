"""Reads the routers' decisions on one text, token by token, for `irc inspect --text`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from irc.errors import InputError
from irc.model.modules import Record
from irc.model.routed import RoutedForCausalLM
from irc.text.source import load_text, token_ids

TOKEN_CLASSES = ("word", "number", "punctuation", "space", "line end", "other")


@dataclass(frozen=True)
class Routes:
    """The routes of one text.

    Attributes:
        tokens: The text of each token.
        units: Names of the units.
        kinds: `attention` or `ffn`, for each unit.
        execute: bool [units, tokens], true where the unit was executed.
        confidence: float32 [units, tokens], the probability that the router gives to its own choice, 0.5 to 1. It
            includes the threshold.
        error: float32 [units, tokens], 1 - cosine between the forecast and the unit's output.
    """

    tokens: tuple[str, ...]
    units: tuple[str, ...]
    kinds: tuple[str, ...]
    execute: torch.Tensor
    confidence: torch.Tensor
    error: torch.Tensor

    @property
    def classes(self) -> tuple[str, ...]:
        """The class of each token, one of `TOKEN_CLASSES`."""
        return tuple(token_class(token) for token in self.tokens)

    def facts(self) -> dict[str, Any]:
        """Return the shares of skipped pairs and the mean forecast errors as plain data.

        Returns:
            `tokens` (their number), `skipped` (share of all pairs), `by_unit`, `by_class`, and `error_by_unit` (mean
            1 - cosine of executed and of skipped tokens; None where there are none). It is not averaged over units:
            units that are hard to forecast skip least, which would hide what the routers do within a unit.
        """
        skipped = 1 - self.execute.double().mean(0)
        classes = self.classes
        by_class = {}
        for name in TOKEN_CLASSES:
            tokens = [index for index, token_class in enumerate(classes) if token_class == name]
            if tokens:
                by_class[name] = {"tokens": len(tokens), "skipped": skipped[tokens].mean().item()}
        by_unit = 1 - self.execute.double().mean(1)
        return {
            "tokens": len(self.tokens),
            "skipped": skipped.mean().item(),
            "by_unit": dict(zip(self.units, by_unit.tolist(), strict=True)),
            "by_class": by_class,
            "error_by_unit": {
                name: {"executed": _mean(error[execute]), "skipped": _mean(error[~execute])}
                for name, error, execute in zip(self.units, self.error, self.execute, strict=True)
            },
        }


@torch.no_grad()
def read_routes(model: RoutedForCausalLM, spec: str, limit: int) -> Routes:
    """Run a bundle on the beginning of a text and record every decision.

    Args:
        model: A bundle.
        spec: A text, as `irc.text.source.load_text` reads it.
        limit: Most tokens to read.

    Raises:
        InputError: The model is plain, or the text has no tokens.
    """
    if model.spec is None:
        raise InputError("a plain model routes nothing, so there are no decisions to show; convert it first")
    tokenizer: Any = model.base.tokenizer
    ids: list[int] = []
    for document in load_text(spec).documents:
        ids += token_ids(document, tokenizer)
        if len(ids) >= limit:
            break
    context = getattr(model.config, "max_position_embeddings", None) or limit
    ids = ids[: min(limit, context)]
    if not ids:
        raise InputError(f"{spec}: the text has no tokens; give more text")
    tape: dict[str, Record] = {}
    with model.control.using(mode="route", tape=tape, measure_error=True):
        model.states(torch.tensor([ids], device=model.device))
    records = [tape[unit.name] for unit in model.units]
    difference = torch.stack([_as_float(record.difference)[0] for record in records]).cpu()
    return Routes(
        tokens=tuple(tokenizer.decode([token]) for token in ids),
        units=tuple(unit.name for unit in model.units),
        kinds=tuple(unit.kind for unit in model.units),
        execute=torch.stack([record.execute[0] for record in records]).cpu(),
        confidence=torch.sigmoid(difference.abs()),
        error=torch.stack([1 - _as_float(record.cosine)[0] for record in records]).cpu(),
    )


def token_class(token: str) -> str:
    """Return the class of a token: `line end` if it contains one, or else the class of most of its characters."""
    if "\n" in token:
        return "line end"
    inner = token.strip()
    if not inner:
        return "space" if token else "other"
    counts = {
        "word": sum(letter.isalpha() or letter == "_" for letter in inner),
        "number": sum(letter.isdecimal() for letter in inner),
    }
    rest = len(inner) - sum(counts.values())
    counts["punctuation" if inner.isprintable() and inner.isascii() else "other"] = rest
    return max(counts, key=lambda name: counts[name])


def _as_float(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.float()


def _mean(values: torch.Tensor) -> float | None:
    return values.double().mean().item() if values.numel() else None
