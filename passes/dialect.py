"""The `irc::` operators, which the graph of a routed model uses beside those of torch.

Routing operators (`select_rows`, `decide_rows`, `compact`, `scatter`, `scatter_add`, `routed_matmul`, `routed_gate`,
`router`, `forecast_add`, `routed_attention`, `reduced_attention`) choose and move tokens; each becomes a node of the
ONNX domain `irc`. Raised operators (`rms_norm`, `rotary`, `attention`) replace many captured nodes by one; each
becomes one standard ONNX operator. docs/operators.md describes them.

Rows are (sequence, token) pairs, int64 [1, n, 2]. Compacted tensors keep a leading 1, [1, n, d], so that they look
like [batch, tokens, d] to the operators that read them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from passes import dialect_attention  # noqa: F401 - registers attention


@torch.library.custom_op("irc::select_rows", mutates_args=())
def select_rows(mask: Tensor, padded: int = 0) -> tuple[Tensor, Tensor]:
    """Return the true and the false tokens of a bool [batch, tokens] as rows, each in order of sequence and token.

    Args:
        mask: bool [batch, tokens].
        padded: With at most this many tokens, a kernel may return batch * tokens rows of each kind and pad the end
            with (-1, -1), so that the number of rows does not depend on the mask. Ignored here.
    """
    return mask.nonzero().contiguous().unsqueeze(0), (~mask).nonzero().contiguous().unsqueeze(0)


@select_rows.register_fake
def _(mask: Tensor, padded: int = 0) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    true, false = (mask.new_empty([1, context.new_dynamic_size(), 2], dtype=torch.int64) for _ in range(2))
    return true, false


@torch.library.custom_op("irc::decide_rows", mutates_args=())
def decide_rows(difference: Tensor, padded: int = 0, unit: str = "") -> tuple[Tensor, Tensor]:
    """Return the tokens that execute and those that are approximated, as `select_rows` does.

    Args:
        difference: float32 [batch, tokens], execute logit minus approximate logit; negative approximates, everything
            else, NaN too, executes.
        padded: As of `select_rows`.
        unit: Name of the unit that is decided about. It changes no result: the exporter names the decision by it.
    """
    executed, skipped = select_rows(~(difference < 0), padded)
    return executed, skipped


@decide_rows.register_fake
def _(difference: Tensor, padded: int = 0, unit: str = "") -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    true, false = (difference.new_empty([1, context.new_dynamic_size(), 2], dtype=torch.int64) for _ in range(2))
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


@torch.library.custom_op("irc::routed_matmul", mutates_args=())
def routed_matmul(x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Return x [1, n, d] @ weight [d, out]; `rows` [1, n, 2] tell a kernel which rows are padding."""
    return x @ weight


@routed_matmul.register_fake
def _(x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty([*x.shape[:2], weight.shape[1]])


@torch.library.custom_op("irc::routed_gate", mutates_args=())
def routed_gate(x: Tensor, rows: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(x @ gate) * (x @ up) of x [1, n, d]; gate and up are [d, out], `rows` as in `routed_matmul`."""
    return F.silu(x @ gate) * (x @ up)


@routed_gate.register_fake
def _(x: Tensor, rows: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty([*x.shape[:2], gate.shape[1]])


@torch.library.custom_op("irc::router", mutates_args=())
def router(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Return the execute logit minus the approximate logit of each token, float32 [batch, tokens].

    Args:
        x: [batch, tokens, d].
        w1: [d, hidden].
        b1: [hidden].
        w2: [hidden, 1], which makes the difference of the two logits.
        b2: [1].
    """
    return (F.relu(x @ w1 + b1) @ w2 + b2).squeeze(-1).float()


@router.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("irc::forecast_add", mutates_args=())
def forecast_add(x: Tensor, rows: Tensor, base: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """Return base with the forecasts of the tokens `rows`, which are all different, added to those tokens.

    Args:
        x: Input of the forecaster, [batch, tokens, d].
        rows: int64 [1, n, 2].
        base: [batch, tokens, out].
        down: [d, rank].
        up: [rank, out].
        bias: [out].
    """
    index = rows[..., 0], rows[..., 1]
    return base.index_put(index, base[index] + (x[index] @ down @ up + bias))


@forecast_add.register_fake
def _(x: Tensor, rows: Tensor, base: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(base)


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
    """Rotate the first 2 k features of every head of x [batch, tokens, heads * size]; cos, sin: [batch, tokens, k]."""
    half = cos.shape[-1]
    parts = x.unflatten(-1, (heads, -1))
    left, right, rest = parts[..., :half], parts[..., half : 2 * half], parts[..., 2 * half :]
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    result: Tensor = torch.cat((left * c - right * s, right * c + left * s, rest), dim=-1).flatten(-2)
    return result


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    return torch.empty_like(x)
