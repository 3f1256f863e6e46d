"""The `irc::` operators: what the graph of a routed model says beyond torch's own operators.

Routing operators (`select_rows`, `compact`, `scatter`, `scatter_add`, `router`, `forecast_add`, `routed_attention`,
`reduced_attention`) choose and move tokens; each becomes a node of the ONNX domain `irc`. Raised operators (`rms_norm`,
`rotary`, `attention`) say in one word what capture spread over many nodes; each becomes one standard ONNX operator.
docs/operators.md describes them.

Rows are (sequence, token) pairs, int64 [1, n, 2]. Compacted tensors keep a leading 1, [1, n, d], so that whatever works
on [batch, tokens, d] works on them too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MASKED = -1e30  # finite: a row that sees nothing must not become NaN


@torch.library.custom_op("irc::select_rows", mutates_args=())
def select_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the true and the false tokens of a bool [batch, tokens] as rows, each in order of sequence and token."""
    return mask.nonzero().contiguous().unsqueeze(0), (~mask).nonzero().contiguous().unsqueeze(0)


@select_rows.register_fake
def _(mask: Tensor) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    true, false = (mask.new_empty([1, context.new_dynamic_size(), 2], dtype=torch.int64) for _ in range(2))
    return true, false


@torch.library.custom_op("irc::compact", mutates_args=())
def compact(x: Tensor, rows: Tensor) -> Tensor:
    """Return the tokens `rows` [1, n, 2] of x [batch, tokens, d]; [1, n, d]."""
    return x[rows[..., 0], rows[..., 1]]


@compact.register_fake
def _(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty([1, rows.shape[1], x.shape[2]])


@torch.library.custom_op("irc::scatter", mutates_args=())
def scatter(y: Tensor, rows: Tensor, base: Tensor) -> Tensor:
    """Return base [batch, tokens, d] with the tokens `rows` [1, n, 2] replaced by y [1, n, d]."""
    return base.index_put((rows[..., 0], rows[..., 1]), y)


@scatter.register_fake
def _(y: Tensor, rows: Tensor, base: Tensor) -> Tensor:
    return torch.empty_like(base)


@torch.library.custom_op("irc::scatter_add", mutates_args=())
def scatter_add(y: Tensor, rows: Tensor, base: Tensor) -> Tensor:
    """Return base [batch, tokens, d] with y [1, n, d] added to its tokens `rows` [1, n, 2], which are all different."""
    index = rows[..., 0], rows[..., 1]
    return base.index_put(index, base[index] + y)


@scatter_add.register_fake
def _(y: Tensor, rows: Tensor, base: Tensor) -> Tensor:
    return torch.empty_like(base)


@torch.library.custom_op("irc::router", mutates_args=())
def router(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Return how much rather each token executes than is approximated, float32 [batch, tokens].

    Args:
        x: [batch, tokens, d].
        w1: [d, hidden].
        b1: [hidden].
        w2: [hidden, 1], of the difference of the two logits.
        b2: [1].
    """
    return (F.relu(x @ w1 + b1) @ w2 + b2).squeeze(-1).float()


@router.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("irc::forecast_add", mutates_args=())
def forecast_add(x: Tensor, rows: Tensor, base: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """Return base with the forecast of the tokens `rows`, which are all different, added to them.

    Args:
        x: What forecasts are made from, [batch, tokens, d].
        rows: int64 [1, n, 2].
        base: What is added to, [batch, tokens, out].
        down: [d, rank].
        up: [rank, out].
        bias: [out].
    """
    index = rows[..., 0], rows[..., 1]
    return base.index_put(index, base[index] + (x[index] @ down @ up + bias))


@forecast_add.register_fake
def _(x: Tensor, rows: Tensor, base: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(base)


@torch.library.custom_op("irc::stored", mutates_args=())
def stored(past_k: Tensor, execute: Tensor) -> Tensor:
    """Return which tokens have a key, bool [batch, past + tokens].

    Args:
        past_k: [batch, kv_heads, past, size]; a key of zeros in all heads stands for none.
        execute: bool [batch, tokens]; executed tokens store their key.
    """
    return torch.cat(((past_k != 0).any(dim=-1).any(dim=1), execute), dim=1)


@stored.register_fake
def _(past_k: Tensor, execute: Tensor) -> Tensor:
    return execute.new_empty([execute.shape[0], past_k.shape[2] + execute.shape[1]])


@torch.library.custom_op("irc::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise every chunk of weight.numel() features of x [..., d] by its root mean square, in float32."""
    chunks = x.unflatten(-1, (-1, weight.shape[0])).float()
    normed = chunks * torch.rsqrt(chunks.pow(2).mean(-1, keepdim=True) + eps)
    result: Tensor = (weight * normed.to(x.dtype)).flatten(-2)
    return result


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("irc::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate x [batch, tokens, heads * size] by cos and sin [batch, tokens, size / 2], halves apart."""
    left, right = x.unflatten(-1, (heads, -1)).chunk(2, dim=-1)
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    result: Tensor = torch.cat((left * c - right * s, right * c + left * s), dim=-1).flatten(-2)
    return result


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.empty_like(x)


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
    keys, values = _append(past_k, k), _append(past_v, v)
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
    """Attend from the tokens `rows` alone to past and present ones.

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
    keys, values = _append(past_k, k), _append(past_v, v)
    dense = scatter(q, rows, q.new_zeros(*k.shape[:2], q.shape[-1]))
    return compact(_attend(dense, keys, values, mask, heads, scale), rows), keys, values


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
    """Attend from the tokens `rows` alone to stored ones, of which they become the last.

    Args:
        q: Of the executed tokens, [1, n, heads * size].
        rows: Where they are, in order, int64 [1, n, 2].
        k: Of the executed tokens, [1, n, kv_heads * size].
        v: As k.
        past_k: What is stored, [batch, kv_heads, stored, size].
        past_v: As past_k.
        past_slots: Which token of its sequence each is, int64 [batch, stored]; -1 where there is none (a shorter
            sequence is filled up, with keys and values that mean nothing).
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
    keys, values = _append(past_k, new_k), _append(past_v, new_v)
    known = F.pad(mask, (0, 1)).gather(3, slots[:, None, None, :].expand(-1, 1, tokens, -1) % (mask.shape[3] + 1))
    dense = scatter(q, rows, q.new_zeros(batch, tokens, q.shape[-1]))
    return compact(_attend(dense, keys, values, known, heads, scale), rows), keys, values, slots


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


def _append(past: Tensor, new: Tensor) -> Tensor:
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
