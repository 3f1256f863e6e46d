"""The dialect's operators compared with the same computed by hand, token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from passes import dialect  # noqa: F401 - registers the operators

irc = torch.ops.irc
ROWS = torch.tensor([[[0, 1], [1, 0], [1, 2]]])
BATCH, TOKENS, WIDTH = 2, 3, 6


def _chosen(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[sequence, token] for sequence, token in ROWS[0].tolist()])[None]


def _routed_matmul() -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = torch.randn(1, 3, WIDTH), torch.randn(WIDTH, 4)
    return irc.routed_matmul(x, ROWS, weight), F.linear(x, weight.T)


def _routed_gate() -> tuple[torch.Tensor, torch.Tensor]:
    x, gate, up = torch.randn(1, 3, WIDTH), torch.randn(WIDTH, 4), torch.randn(WIDTH, 4)
    gated, raised = F.linear(x, gate.T), F.linear(x, up.T)
    return irc.routed_gate(x, ROWS, gate, up), gated / (1 + torch.exp(-gated)) * raised


def _router() -> tuple[torch.Tensor, torch.Tensor]:
    x, first, last = torch.randn(BATCH, TOKENS, WIDTH), torch.nn.Linear(WIDTH, 8), torch.nn.Linear(8, 1)
    logit = last(first(x).clamp(min=0))[..., 0]
    return irc.router(x, first.weight.T, first.bias, last.weight.T, last.bias), logit


def _forecast_add() -> tuple[torch.Tensor, torch.Tensor]:
    x, base = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, TOKENS, 5)
    down, up, bias = torch.randn(WIDTH, 2), torch.randn(2, 5), torch.randn(5)
    expected = base.clone()
    for sequence, token in ROWS[0].tolist():
        expected[sequence, token] += F.linear(F.linear(x[sequence, token], down.T), up.T) + bias
    return irc.forecast_add(x, ROWS, base, down, up, bias), expected


def _rotary() -> tuple[torch.Tensor, torch.Tensor]:
    """Two heads of 7 features, 4 of which rotate, as complex numbers."""
    x, angles = torch.randn(BATCH, TOKENS, 14), torch.randn(BATCH, TOKENS, 2)
    expected = x.clone()
    for head in range(2):
        left, right = x[..., 7 * head : 7 * head + 2], x[..., 7 * head + 2 : 7 * head + 4]
        turned = torch.complex(left, right) * torch.polar(torch.ones_like(angles), angles)
        expected[..., 7 * head : 7 * head + 2] = turned.real
        expected[..., 7 * head + 2 : 7 * head + 4] = turned.imag
    return irc.rotary(x, angles.cos(), angles.sin(), 2), expected


def _attention() -> tuple[torch.Tensor, torch.Tensor]:
    """Four query heads, two of keys, with a past of two, one query and one key at a time."""
    q, k, v = torch.randn(BATCH, TOKENS, 12), torch.randn(BATCH, TOKENS, 6), torch.randn(BATCH, TOKENS, 6)
    past_k, past_v = torch.randn(BATCH, 2, 2, 3), torch.randn(BATCH, 2, 2, 3)
    mask = torch.rand(BATCH, 1, TOKENS, 5) < 0.6
    mask[..., 0] = True
    expected = torch.empty(BATCH, TOKENS, 12)
    for sequence in range(BATCH):
        for token in range(TOKENS):
            for head in range(4):
                of = slice(3 * (head // 2), 3 * (head // 2) + 3)
                keys = torch.cat((past_k[sequence, head // 2], k[sequence, :, of]))
                values = torch.cat((past_v[sequence, head // 2], v[sequence, :, of]))
                seen = mask[sequence, 0, token]
                scores = torch.stack([key @ q[sequence, token, 3 * head : 3 * head + 3] * 0.7 for key in keys[seen]])
                expected[sequence, token, 3 * head : 3 * head + 3] = scores.softmax(0) @ values[seen]
    return irc.attention(q, k, v, past_k, past_v, mask, 4, 0.7)[0], expected


NUMBERS = [_routed_matmul, _routed_gate, _router, _forecast_add, _rotary, _attention]


@pytest.mark.parametrize("both", NUMBERS, ids=[both.__name__ for both in NUMBERS])
@torch.no_grad()
def test_numbers_are_those_of_plain_operators(both: Callable) -> None:
    """fp32, 1e-5 absolute."""
    got, expected = both()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_compact_takes_rows_in_their_order() -> None:
    x = torch.randn(BATCH, TOKENS, WIDTH)
    assert torch.equal(irc.compact(x, ROWS), _chosen(x))
    assert torch.equal(irc.compact(x, ROWS.flip(1)), _chosen(x).flip(1))


def test_a_logit_is_float32_whatever_the_model_is() -> None:
    x = torch.randn(1, 3, WIDTH, dtype=torch.bfloat16)
    small = [torch.randn(*shape, dtype=torch.bfloat16) for shape in ((WIDTH, 8), (8,), (8, 1), (1,))]
    assert irc.router(x, *small).dtype == torch.float32


def test_a_norm_is_computed_in_float32_and_rounded_once_before_the_weight() -> None:
    x, weight = torch.randn(1, 2, 8).bfloat16() * 1e3, torch.randn(8).bfloat16()
    wide = x.float()
    normed = (wide / (wide.square().mean(-1, keepdim=True) + 0.5).sqrt()).bfloat16()
    torch.testing.assert_close(irc.rms_norm(x, weight, 0.5), weight * normed, rtol=2**-7, atol=0)


def test_reduced_attention_of_nothing_at_all_only_keeps_the_past() -> None:
    rows, past_k, past_v = torch.zeros(1, 0, 2, dtype=torch.int64), torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    q, k, v = torch.zeros(1, 0, 16), torch.zeros(1, 0, 8), torch.zeros(1, 0, 8)
    slots, mask = torch.tensor([[0, 1, 2], [0, 1, -1]]), torch.ones(2, 1, 2, 5, dtype=torch.bool)
    y, keys, values, found = irc.reduced_attention(q, rows, k, v, past_k, past_v, slots, mask, 4, 0.5)
    assert y.shape == (1, 0, 16)
    assert torch.equal(keys, past_k)
    assert torch.equal(values, past_v)
    assert torch.equal(found, slots)


def test_of_several_executed_tokens_shorter_sequences_are_filled_up_with_none() -> None:
    """Three tokens of the first sequence execute, one of the second; six tokens came before them."""
    rows = torch.tensor([[[0, 0], [0, 2], [0, 3], [1, 1]]])
    q, k, v = torch.randn(1, 4, 16), torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    past = torch.randn(2, 2, 1, 4)
    mask = torch.ones(2, 1, 4, 10, dtype=torch.bool)
    _, keys, values, slots = irc.reduced_attention(q, rows, k, v, past, past, torch.tensor([[4], [-1]]), mask, 4, 0.5)
    assert slots.tolist() == [[4, 6, 8, 9], [-1, 7, -1, -1]]
    for new, joined in ((k, keys), (v, values)):
        assert torch.equal(joined[:, :, :1], past)
        assert torch.equal(joined[0, :, 1:].transpose(0, 1).flatten(1), new[0, :3])
        assert torch.equal(joined[1, :, 1].flatten(), new[0, 3])


@pytest.mark.parametrize("name", ["attention", "routed_attention"])
def test_rows_that_see_nothing_are_finite_in_every_dtype(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q, kv, past = torch.randn(1, 3, 16).to(dtype), torch.randn(1, 3, 8).to(dtype), torch.randn(1, 2, 1, 4).to(dtype)
        mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
        mask[:, :, 1] = False
        rows = [torch.tensor([[[0, 0], [0, 1], [0, 2]]])] if name == "routed_attention" else []
        y, _, _ = getattr(irc, name)(q, *rows, kv, kv, past, past, mask, 4, 0.5)
        assert y.dtype == dtype
        assert y.isfinite().all()


def test_hidden_keys_have_no_part_in_a_result() -> None:
    q, k, v, past = torch.randn(1, 3, 16), torch.randn(1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 2, 1, 4)
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    mask[..., 2] = False
    seen = irc.attention(q, k, v, past, past, mask, 4, 0.5)[0]
    k[:, 1], v[:, 1] = 1e3, 1e3
    assert torch.equal(irc.attention(q, k, v, past, past, mask, 4, 0.5)[0], seen)


def test_how_many_rows_there_are_is_unknown_until_they_are_chosen() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        executed, skipped = irc.select_rows(torch.ones(2, 5, dtype=torch.bool))
    assert executed.dtype == skipped.dtype == torch.int64
    for rows in (executed, skipped):
        assert (rows.shape[0], rows.shape[2]) == (1, 2)
        assert isinstance(rows.shape[1], torch.SymInt)
    assert executed.shape[1] is not skipped.shape[1]
