"""Test cases for RoutedAttention kernels: random inputs, and the result of the eager operator in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporters.onnx_dtypes import FLOATS
from irc.dtypes import torch_dtype
from passes import dialect  # noqa: F401 - registers the operators

# Relative to the largest number. Kernels sum in float32 and round weights and results to the data type.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_MASKED = {torch_dtype(kind.short): kind.masked for kind in FLOATS if kind.masked is not None}


@dataclass(frozen=True)
class AttentionCase:
    """Inputs of the operator and its expected outputs.

    Attributes:
        inputs: In the operator's order, with an additive mask.
        attributes: Attributes of the node.
        expected: Expected y of the rows that are not padding, keys and values, in float32.
    """

    inputs: list[Tensor]
    attributes: dict[str, Any]
    expected: list[Tensor]

    def is_near(self, found: Sequence[Tensor], tolerances: Mapping[torch.dtype, float] = TOLERANCES) -> bool:
        """Return whether outputs are right: y up to rounding and zero in padding rows, keys and values bit for bit.

        Args:
            found: y, keys and values.
            tolerances: By data type, relative to the largest number.
        """
        y, *cache = found
        expected_y, *expected_cache = self.expected
        dtype, rows = self.inputs[0].dtype, expected_y.shape[1]
        for output, expected in zip(found, self.expected, strict=True):
            if output.dtype != dtype or output.shape[2:] != expected.shape[2:]:
                return False
        if y.shape[:2] != self.inputs[0].shape[:2] or bool(y[:, rows:].any()):
            return False
        largest = max(1.0, float(expected_y.abs().max())) if rows else 1.0
        near = (y[:, :rows].float() - expected_y).abs() <= tolerances[dtype] * largest
        return bool(near.all()) and all(
            torch.equal(output, expected.to(dtype)) for output, expected in zip(cache, expected_cache, strict=True)
        )


@dataclass(frozen=True)
class AttentionSizes:
    """Sizes of a case.

    Attributes:
        batch: Sequences, at least 1.
        tokens: New tokens, at least 1.
        past: Tokens in the cache.
        kv_heads: Heads of keys and values.
        group: Query heads for each of them.
        size: Numbers per head.
    """

    batch: int
    tokens: int
    past: int
    kv_heads: int
    group: int
    size: int


@dataclass(frozen=True)
class HiddenKeys:
    """Keys that are hidden from a token in addition to those of later tokens. A token always sees its own key.

    Attributes:
        window: Number of keys that a token sees, including its own; 0 for all.
        left: Whether the first keys of each sequence are hidden, a random number of them.
        share: Share of keys that are hidden from all other tokens.
    """

    window: int = 0
    left: bool = False
    share: float = 0.0


def draw_attention(
    batch: int, tokens: int, share: float, dtype: torch.dtype, generator: torch.Generator, padded: bool
) -> AttentionCase:
    """Draw a case: its heads, its past, and a mask that is causal and may have a window or padding on the left.

    Args:
        batch: Sequences, at least 1.
        tokens: New tokens, at least 1.
        share: Share of executed tokens.
        dtype: Data type of all numbers.
        generator: Source of all random numbers.
        padded: Whether rows (-1, -1) may follow, which only CUDA kernels accept.
    """
    kv_heads = choice(generator, 1, 2, 3)
    group = choice(generator, 1, 2, 4, 7)
    size = choice(generator, 8, 32, 64, 96, 128)
    past = choice(generator, 0, 1, 70, 600)
    padding = choice(generator, 0, 1, 5) if padded else 0
    hidden = HiddenKeys(window=choice(generator, 0, 40), left=bool(choice(generator, 0, 1)))
    sizes = AttentionSizes(batch, tokens, past, kv_heads, group, size)
    return attention_case(generator, sizes, share=share, dtype=dtype, padding=padding, hidden=hidden)


def attention_case(
    generator: torch.Generator,
    sizes: AttentionSizes,
    *,
    share: float = 1.0,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    hidden: HiddenKeys | None = None,
) -> AttentionCase:
    """Draw the numbers of a case under a causal mask.

    Args:
        generator: Source of all random numbers.
        sizes: Sizes of the case.
        share: Share of executed tokens.
        dtype: Data type of all numbers.
        padding: Number of rows (-1, -1) after those of tokens.
        hidden: Keys that are hidden as well; none if None.
    """
    irc, heads = torch.ops.irc, sizes.kv_heads * sizes.group
    keys = sizes.past + sizes.tokens

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows, _ = irc.select_rows(torch.rand((sizes.batch, sizes.tokens), generator=generator) < share)
    q = random(1, rows.shape[1], heads * sizes.size)
    k_and_v = [random(sizes.batch, sizes.tokens, sizes.kv_heads * sizes.size) for _ in range(2)]
    k_and_v += [random(sizes.batch, sizes.kv_heads, sizes.past, sizes.size) for _ in range(2)]
    visible = _visible(generator, sizes, hidden or HiddenKeys())
    scale = float(torch.tensor(sizes.size, dtype=torch.float32).rsqrt())
    exact_q, *exact_k_and_v = [tensor.float() for tensor in (q, *k_and_v)]
    expected = irc.routed_attention(exact_q, rows, *exact_k_and_v, visible, heads, scale)
    mask = torch.zeros(sizes.batch, sizes.tokens, keys).masked_fill(~visible[:, 0], _MASKED[dtype]).to(dtype)
    padded_q = torch.nn.functional.pad(q, (0, 0, 0, padding))
    padded_rows = torch.nn.functional.pad(rows, (0, 0, 0, padding), value=-1)
    attributes = {"heads": heads, "kv_heads": sizes.kv_heads, "scale": scale}
    return AttentionCase([padded_q, padded_rows, *k_and_v, mask], attributes, list(expected))


def _visible(generator: torch.Generator, sizes: AttentionSizes, hidden: HiddenKeys) -> Tensor:
    """Return which keys each token sees, bool [batch, 1, tokens, past + tokens]."""
    keys = sizes.past + sizes.tokens
    key, own = torch.arange(keys), torch.arange(sizes.tokens)[:, None] + sizes.past
    first = torch.randint(keys, (sizes.batch, 1, 1, 1), generator=generator) if hidden.left else 0
    shown = torch.rand((sizes.batch, 1, 1, keys), generator=generator) >= hidden.share
    in_window = key > own - (hidden.window or keys)
    return shown & (key <= own) & in_window & (key >= first) | (key == own)


def choice(generator: torch.Generator, *values: int) -> int:
    """Draw one of the values."""
    return values[int(torch.randint(0, len(values), (), generator=generator))]
