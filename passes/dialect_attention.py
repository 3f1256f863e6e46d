"""The attention operators of the `irc::` dialect: from all tokens, from some, and from some to stored tokens.

`passes/dialect.py` registers them and explains rows and shapes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MASKED = -1e30  # finite: a row that sees nothing must not become NaN


@torch.library.custom_op("irc::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor, heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from all tokens to past and present ones.

    Args:
        q: [batch, tokens, heads * size].
        k: [batch, tokens, kv_heads * size].
        v: As k.
        past_k: [batch, kv_heads, past, size].
        past_v: As past_k.
        mask: bool [batch, 1, tokens, past + tokens], true where attended.
        heads: Query heads.
        scale: Of the scores.

    Returns:
        y [batch, tokens, heads * size], present keys and values [batch, kv_heads, past + tokens, size].
    """
    keys, values = append(past_k, k), append(past_v, v)
    return _attend(q, keys, values, mask, heads, scale), keys, values


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, mask: Tensor, heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), *_present(k, past_k)


@torch.library.custom_op("irc::routed_attention", mutates_args=())
def routed_attention(
    q: Tensor,
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    mask: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from the tokens `rows` to past and present ones.

    Args:
        q: Of the executed tokens, [1, n, heads * size].
        rows: Where they are, in order, int64 [1, n, 2].
        k: Of all tokens, [batch, tokens, kv_heads * size].
        v: As k.
        past_k: [batch, kv_heads, past, size].
        past_v: As past_k.
        mask: bool [batch, 1, tokens, past + tokens], true where attended.
        heads: Query heads.
        scale: Of the scores.

    Returns:
        y [1, n, heads * size], present keys and values [batch, kv_heads, past + tokens, size] of all tokens.
    """
    keys, values = append(past_k, k), append(past_v, v)
    dense = torch.ops.irc.scatter(q, rows, q.new_zeros(*k.shape[:2], q.shape[-1]))
    return torch.ops.irc.compact(_attend(dense, keys, values, mask, heads, scale), rows), keys, values


@routed_attention.register_fake
def _(
    q: Tensor,
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    mask: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), *_present(k, past_k)


@torch.library.custom_op("irc::reduced_attention", mutates_args=())
def reduced_attention(
    q: Tensor,
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_slots: Tensor,
    mask: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend from the tokens `rows` to stored ones; the tokens `rows` are stored last.

    Args:
        q: Of the executed tokens, [1, n, heads * size].
        rows: Where they are, in order, int64 [1, n, 2].
        k: Of the executed tokens, [1, n, kv_heads * size].
        v: As k.
        past_k: Stored keys, [batch, kv_heads, stored, size].
        past_v: As past_k.
        past_slots: Index of each stored token in its sequence, int64 [batch, stored]; -1 is padding, whose keys and
            values are ignored.
        mask: bool [batch, 1, tokens, past + tokens], true where attended, of all tokens of the sequences.
        heads: Query heads.
        scale: Of the scores.

    Returns:
        y [1, n, heads * size], keys and values [batch, kv_heads, stored + longest, size], slots
        [batch, stored + longest]; longest is the largest number of executed tokens of a sequence.
    """
    batch, tokens = mask.shape[0], mask.shape[2]
    sequence, token = rows[0, :, 0], rows[0, :, 1]
    counts = torch.bincount(sequence, minlength=batch)
    longest = int(counts.max()) if batch else 0
    place = torch.arange(len(sequence), device=rows.device) - (counts.cumsum(0) - counts)[sequence]
    new_k, new_v = (t.new_zeros(batch, longest, t.shape[-1]).index_put((sequence, place), t[0]) for t in (k, v))
    slots = past_slots.new_full((batch, longest), -1)
    slots = torch.cat((past_slots, slots.index_put((sequence, place), token + mask.shape[3] - tokens)), dim=1)
    keys, values = append(past_k, new_k), append(past_v, new_v)
    known = F.pad(mask, (0, 1)).gather(3, slots[:, None, None, :].expand(-1, 1, tokens, -1) % (mask.shape[3] + 1))
    dense = torch.ops.irc.scatter(q, rows, q.new_zeros(batch, tokens, q.shape[-1]))
    return torch.ops.irc.compact(_attend(dense, keys, values, known, heads, scale), rows), keys, values, slots


@reduced_attention.register_fake
def _(
    q: Tensor,
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_slots: Tensor,
    mask: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, kv_heads, _, size = past_k.shape
    total = torch.library.get_ctx().new_dynamic_size()
    keys, values = (past_k.new_empty([batch, kv_heads, total, size]) for _ in range(2))
    return torch.empty_like(q), keys, values, past_slots.new_empty([batch, total])


def append(past: Tensor, new: Tensor) -> Tensor:
    """Return past [batch, heads, past, size] followed by new [batch, tokens, heads * size]."""
    return torch.cat((past, new.unflatten(-1, (past.shape[1], -1)).transpose(1, 2)), dim=2)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: int, scale: float) -> Tensor:
    repeats = heads // keys.shape[1]
    split = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
    added = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, max(_MASKED, _least(q.dtype)))
    y = F.scaled_dot_product_attention(split, k, v, attn_mask=added, scale=scale)
    return y.transpose(1, 2).flatten(-2)


def _least(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min / 2


def _present(new: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, size = past.shape
    shape = [batch, heads, length + new.shape[1], size]
    return new.new_empty(shape), new.new_empty(shape)
