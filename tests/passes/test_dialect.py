from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from passes import dialect  # noqa: F401 - registers the operators

irc = torch.ops.irc
CHECKS = ("test_schema", "test_faketensor")


def _attention_inputs(tokens: int = 5, past: int = 3) -> tuple[torch.Tensor, ...]:
    q, k, v = torch.randn(2, tokens, 16), torch.randn(2, tokens, 8), torch.randn(2, tokens, 8)
    past_k, past_v = torch.randn(2, 2, past, 4), torch.randn(2, 2, past, 4)
    mask = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past).expand(2, 1, -1, -1)
    return q, k, v, past_k, past_v, mask


def _reduced_inputs(execute: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, k, v, past_k, past_v, mask = _attention_inputs()
    rows, _ = irc.select_rows(execute)
    slots = torch.tensor([[0, 2, -1], [1, -1, -1]])
    return *(irc.compact(q, rows), rows, irc.compact(k, rows), irc.compact(v, rows)), past_k, past_v, slots, mask


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_schemas_and_fake_kernels(share: float) -> None:
    """Schema and fake kernel of every operator agree with what it computes, with no, some and all rows."""
    mask = torch.rand(2, 5) < share
    rows, _ = irc.select_rows(mask)
    x, base = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    q, *others = _attention_inputs()
    angles = torch.randn(2, 5, 2)
    opcheck(irc.select_rows.default, (mask,), test_utils=CHECKS)
    opcheck(irc.select_rows.default, (mask, 32), test_utils=CHECKS)
    difference = torch.where(mask, 1.0, -1.0)
    opcheck(irc.decide_rows.default, (difference,), test_utils=CHECKS)
    opcheck(irc.decide_rows.default, (difference, 32), {"unit": "model.layers.0.mlp"}, test_utils=CHECKS)
    opcheck(irc.compact.default, (x, rows), test_utils=CHECKS)
    opcheck(irc.scatter.default, (irc.compact(x, rows), rows, base), test_utils=CHECKS)
    opcheck(irc.scatter_add.default, (irc.compact(x, rows), rows, base), test_utils=CHECKS)
    opcheck(irc.routed_matmul.default, (irc.compact(x, rows), rows, torch.randn(6, 4)), test_utils=CHECKS)
    gate = torch.randn(6, 4), torch.randn(6, 4)
    opcheck(irc.routed_gate.default, (irc.compact(x, rows), rows, *gate), test_utils=CHECKS)
    small = torch.randn(6, 4), torch.randn(4), torch.randn(4, 1), torch.randn(1)
    opcheck(irc.router.default, (x, *small), test_utils=CHECKS)
    forecaster = torch.randn(6, 3), torch.randn(3, 6), torch.randn(6)
    opcheck(irc.forecast_add.default, (x, rows, base, *forecaster), test_utils=CHECKS)
    opcheck(irc.rms_norm.default, (x, torch.randn(6), 1e-6), test_utils=CHECKS)
    opcheck(irc.rotary.default, (q, angles, angles, 4), test_utils=CHECKS)
    opcheck(irc.attention.default, (q, *others, 4, 0.5), test_utils=CHECKS)
    opcheck(irc.routed_attention.default, (irc.compact(q, rows), rows, *others, 4, 0.5), test_utils=CHECKS)
    opcheck(irc.reduced_attention.default, (*_reduced_inputs(mask), 4, 0.5), test_utils=CHECKS)


def test_rows_are_selected_in_order() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    true, false = irc.select_rows(mask)
    assert true.tolist() == [[[0, 0], [0, 2], [1, 1], [1, 2]]]
    assert false.tolist() == [[[0, 1], [1, 0]]]


def test_only_a_negative_difference_approximates() -> None:
    numbers = [[-1.0, 0.0, -0.0, torch.nan], [-torch.inf, 1.0, torch.inf, -torch.nan]]
    executed, skipped = irc.decide_rows(torch.tensor(numbers))
    assert executed.tolist() == [[[0, 1], [0, 2], [0, 3], [1, 1], [1, 2], [1, 3]]]
    assert skipped.tolist() == [[[0, 0], [1, 0]]]


def test_scatter_puts_back_what_compact_took_and_keeps_the_rest() -> None:
    x, base = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.rand(3, 4) < 0.5
    rows, _ = irc.select_rows(mask)
    result = irc.scatter(irc.compact(x, rows), rows, base)
    torch.testing.assert_close(result, torch.where(mask.unsqueeze(-1), x, base), rtol=0, atol=0)
    assert (result != base).any()
    assert (result != x).any()


def test_scatter_add_adds_to_the_chosen_tokens_alone() -> None:
    x, base = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.rand(3, 4) < 0.5
    rows, _ = irc.select_rows(mask)
    result = irc.scatter_add(irc.compact(x, rows), rows, base)
    torch.testing.assert_close(result, torch.where(mask.unsqueeze(-1), base + x, base), rtol=0, atol=0)


def test_norm_over_heads_is_the_norm_of_each_head() -> None:
    x, weight = torch.randn(2, 3, 12), torch.randn(4)
    expected = torch.nn.functional.rms_norm(x.unflatten(-1, (3, 4)), (4,), weight, 1e-6).flatten(-2)
    torch.testing.assert_close(irc.rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_routed_attention_is_attention_at_the_chosen_rows(share: float) -> None:
    """Rows equal those of attention to fp32 rounding (1e-6); keys and values are those of all tokens."""
    q, *others = _attention_inputs()
    rows, _ = irc.select_rows(torch.rand(2, 5) < share)
    y, keys, values = irc.attention(q, *others, 4, 0.5)
    found, found_keys, found_values = irc.routed_attention(irc.compact(q, rows), rows, *others, 4, 0.5)
    torch.testing.assert_close(found, irc.compact(y, rows), rtol=0, atol=1e-6)
    assert torch.equal(found_keys, keys)
    assert torch.equal(found_values, values)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_reduced_attention_is_attention_to_stored_keys(share: float) -> None:
    """Rows equal those of attention whose mask leaves out what is not stored, to fp32 rounding (1e-6)."""
    execute = torch.rand(2, 5) < share
    execute[:, 0] = True
    q_rows, rows, k_rows, v_rows, past_k, past_v, slots, mask = _reduced_inputs(execute)
    y, keys, values, found = irc.reduced_attention(q_rows, rows, k_rows, v_rows, past_k, past_v, slots, mask, 4, 0.5)
    known = torch.zeros(2, 8, dtype=torch.bool)
    dense_k, dense_v = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 8, 4)
    for sequence in range(2):
        for place, slot in enumerate(found[sequence].tolist()):
            if slot >= 0:
                known[sequence, slot] = True
                dense_k[sequence, :, slot], dense_v[sequence, :, slot] = (
                    keys[sequence, :, place],
                    values[sequence, :, place],
                )
    assert torch.equal(known[:, 3:], execute)
    assert known[:, :3].tolist() == [[True, False, True], [False, True, False]]
    dense_q = irc.scatter(q_rows, rows, torch.zeros(2, 5, 16))
    new_k, new_v = (t[:, :, 3:].transpose(1, 2).flatten(-2) for t in (dense_k, dense_v))
    masked = mask & known[:, None, None]
    expected, _, _ = irc.attention(dense_q, new_k, new_v, dense_k[:, :, :3], dense_v[:, :, :3], masked, 4, 0.5)
    torch.testing.assert_close(y, irc.compact(expected, rows), rtol=0, atol=1e-6)


def test_a_row_that_sees_nothing_is_finite() -> None:
    q, k, v, past_k, past_v, mask = _attention_inputs()
    y, _, _ = irc.attention(q, k, v, past_k, past_v, torch.zeros_like(mask), 4, 0.5)
    assert y.isfinite().all()
