"""What kernels of RoutedAttention are held against: the eager operator in float32, and how far a type may be off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passes import dialect  # noqa: F401 - registers the operators

# Of the largest number. Sums are of float32; weights and results are rounded to the type.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_MASKED = {torch.float32: -1e30, torch.float16: -3e4, torch.bfloat16: -1e30}


@dataclass(frozen=True)
class AttentionCase:
    """Inputs of the operator, and what it should make of them.

    Attributes:
        inputs: In the operator's order, with the mask that is added.
        attributes: Of the node.
        expected: y of the rows that are tokens, keys and values, in float32.
    """

    inputs: list[Tensor]
    attributes: dict[str, Any]
    expected: list[Tensor]

    def is_near(self, found: Sequence[Tensor], tolerances: Mapping[torch.dtype, float] = TOLERANCES) -> bool:
        """Return whether y is right up to rounding, zeros in rows that are nothing, and the cache right to the bit.

        Args:
            found: y, keys and values.
            tolerances: By type, relative to the largest number.
        """
        y, *cache = found
        wanted, *whole = self.expected
        dtype, rows = self.inputs[0].dtype, wanted.shape[1]
        if any(a.dtype != dtype or a.shape[2:] != b.shape[2:] for a, b in zip(found, self.expected, strict=True)):
            return False
        if y.shape[:2] != self.inputs[0].shape[:2] or bool(y[:, rows:].any()):
            return False
        largest = max(1.0, float(wanted.abs().max())) if rows else 1.0
        near = (y[:, :rows].float() - wanted).abs() <= tolerances[dtype] * largest
        return bool(near.all()) and all(torch.equal(a, b.to(dtype)) for a, b in zip(cache, whole, strict=True))


def draw_attention(
    batch: int, tokens: int, share: float, dtype: torch.dtype, generator: torch.Generator, padded: bool
) -> AttentionCase:
    """Draw heads, a past, and a mask: causal, with a window, or with padding at the left.

    Args:
        batch: Sequences, 1 or more.
        tokens: New ones, 1 or more.
        share: Of executed tokens.
        dtype: Of all numbers.
        generator: Draws everything.
        padded: Whether rows (-1, -1) follow, which only CUDA kernels take.
    """
    kv_heads, group, size = (_choice(generator, *values) for values in ((1, 2, 3), (1, 2, 4, 7), (8, 32, 64, 96, 128)))
    past, padding = _choice(generator, 0, 1, 70, 600), _choice(generator, 0, 1, 5) if padded else 0
    window, left = _choice(generator, 0, 40), bool(_choice(generator, 0, 1))
    sizes = {"batch": batch, "tokens": tokens, "past": past, "kv_heads": kv_heads, "group": group, "size": size}
    return attention_case(generator, **sizes, share=share, dtype=dtype, padding=padding, window=window, left=left)


def attention_case(
    generator: torch.Generator,
    *,
    batch: int,
    tokens: int,
    past: int,
    kv_heads: int,
    group: int,
    size: int,
    share: float = 1.0,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    window: int = 0,
    left: bool = False,
    hidden: float = 0.0,
) -> AttentionCase:
    """Draw the numbers of a case of given sizes, under a causal mask in which every token sees itself.

    Args:
        generator: Draws everything.
        batch: Sequences, 1 or more.
        tokens: New ones, 1 or more.
        past: Tokens in the cache.
        kv_heads: Heads of keys and values.
        group: Query heads of each of them.
        size: Numbers of a head.
        share: Of executed tokens.
        dtype: Of all numbers.
        padding: Rows (-1, -1) behind those of tokens.
        window: Keys that a token sees, its own among them; 0 for all.
        left: Whether a sequence's first keys, as many as is drawn, are hidden.
        hidden: Share of keys that are hidden from all other tokens.
    """
    irc, heads = torch.ops.irc, kv_heads * group

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows, _ = irc.select_rows(torch.rand((batch, tokens), generator=generator) < share)
    q, cache = random(1, rows.shape[1], heads * size), [random(batch, tokens, kv_heads * size) for _ in "kv"]
    cache += [random(batch, kv_heads, past, size) for _ in "kv"]
    key, own = torch.arange(past + tokens), torch.arange(tokens)[:, None] + past
    begin = torch.randint(past + tokens, (batch, 1, 1, 1), generator=generator) if left else 0
    seen = torch.rand((batch, 1, 1, past + tokens), generator=generator) >= hidden
    visible = seen & (key <= own) & (key > own - (window or past + tokens)) & (key >= begin) | (key == own)
    scale = float(torch.tensor(size, dtype=torch.float32).rsqrt())
    wide = [tensor.float() for tensor in (q, *cache)]
    expected = irc.routed_attention(wide[0], rows, *wide[1:], visible, heads, scale)
    added = torch.zeros(visible[:, 0].shape).masked_fill(~visible[:, 0], _MASKED[dtype]).to(dtype)
    given = [
        torch.nn.functional.pad(q, (0, 0, 0, padding)),
        torch.nn.functional.pad(rows, (0, 0, 0, padding), value=-1),
    ]
    attributes = {"heads": heads, "kv_heads": kv_heads, "scale": scale}
    return AttentionCase([*given, *cache, added], attributes, list(expected))


def _choice(generator: torch.Generator, *values: int) -> int:
    return values[int(torch.randint(0, len(values), (), generator=generator))]
