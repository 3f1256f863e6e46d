"""Coloured text for tables, trees and lines."""

from __future__ import annotations

from dataclasses import dataclass

_RED, _YELLOW, _GREEN = (205, 70, 60), (190, 150, 20), (60, 160, 60)


@dataclass(frozen=True)
class Styled:
    """Text in one style, for a cell of `table` or a label of `tree`.

    Attributes:
        text: The text.
        style: A rich style such as `green` or `dim`.
    """

    text: str
    style: str = ""

    def __str__(self) -> str:
        return self.text


def shade(goodness: float) -> str:
    """Return a style between red (0) and green (1); values outside of the range are clipped."""
    if goodness != goodness:
        return "dim"
    place = 2 * min(max(goodness, 0.0), 1.0)
    low, high, part = (_RED, _YELLOW, place) if place < 1 else (_YELLOW, _GREEN, place - 1)
    channels = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return f"rgb({','.join(map(str, channels))})"
