"""What the routers decide on one text, token by token: the data behind `irc inspect --text`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from irc.errors import InputError
from irc.model.modules import Record
from irc.model.routed import RoutedForCausalLM
from irc.text.source import load_text

CLASSES = ("word", "number", "punctuation", "space", "line end", "other")


@dataclass(frozen=True)
class Routes:
    """The routes of one text.

    Attributes:
        tokens: The text of each token.
        units: Names of the units.
        kinds: `attention` or `ffn`, by unit.
        execute: bool [units, tokens], true where the unit ran.
        confidence: float32 [units, tokens], probability that the router gives its own choice, 0.5 to 1; the
            threshold is folded in.
        error: float32 [units, tokens], 1 - cosine of forecast and unit output.
    """

    tokens: tuple[str, ...]
    units: tuple[str, ...]
    kinds: tuple[str, ...]
    execute: torch.Tensor
    confidence: torch.Tensor
    error: torch.Tensor

    @property
    def classes(self) -> tuple[str, ...]:
        """The class of each token, one of `CLASSES`."""
        return tuple(class_of(token) for token in self.tokens)

    def facts(self) -> dict[str, Any]:
        """Return shares of skipped pairs as plain data: in all, by unit, by token class."""
        skipped = 1 - self.execute.double().mean(0)
        classes = self.classes
        by_class = {}
        for name in CLASSES:
            places = [index for index, found in enumerate(classes) if found == name]
            if places:
                by_class[name] = {"tokens": len(places), "skipped": skipped[places].mean().item()}
        by_unit = 1 - self.execute.double().mean(1)
        return {
            "tokens": len(self.tokens),
            "skipped": skipped.mean().item(),
            "by_unit": dict(zip(self.units, by_unit.tolist(), strict=True)),
            "by_class": by_class,
            "error": {"executed": _mean(self.error[self.execute]), "skipped": _mean(self.error[~self.execute])},
        }


@torch.no_grad()
def read_routes(model: RoutedForCausalLM, spec: str, limit: int) -> Routes:
    """Run a bundle on the beginning of a text and note every decision.

    Args:
        model: Rewritten model with its base in `facts["base"]`.
        spec: What `irc.text.source.load_text` reads.
        limit: Tokens to read at most.

    Raises:
        InputError: The model is plain, or the text has no token.
    """
    if model.spec is None:
        raise InputError("a plain model routes nothing, so there are no decisions to show; convert it first")
    tokenizer: Any = model.facts["base"].tokenizer
    ids: list[int] = []
    for document in load_text(spec).documents:
        ids += tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(ids) >= limit:
            break
    context = getattr(model.config, "max_position_embeddings", None) or limit
    ids = ids[: min(limit, context)]
    if not ids:
        raise InputError(f"--text {spec}: it has no token")
    tape: dict[str, Record] = {}
    with model.control.using(mode="route", tape=tape, measure_error=True):
        model.states(torch.tensor([ids], device=model.device))
    records = [tape[unit.name] for unit in model.units]
    difference = torch.stack([_known(record.difference)[0] for record in records]).cpu()
    return Routes(
        tokens=tuple(tokenizer.decode([token]) for token in ids),
        units=tuple(unit.name for unit in model.units),
        kinds=tuple(unit.kind for unit in model.units),
        execute=torch.stack([record.execute[0] for record in records]).cpu(),
        confidence=torch.sigmoid(difference.abs()),
        error=torch.stack([1 - _known(record.cosine)[0] for record in records]).cpu(),
    )


def class_of(token: str) -> str:
    """Return the class of a token's text: what most of it is, a line end before all."""
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


def _known(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.float()


def _mean(values: torch.Tensor) -> float | None:
    return values.double().mean().item() if values.numel() else None
