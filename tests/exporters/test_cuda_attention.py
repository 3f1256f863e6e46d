"""RoutedAttention's CUDA kernels, thread by thread on the host (conftest's `run`), against the eager operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from irc.runtime.native_check import NodeRunner

irc = torch.ops.irc
KINDS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
# Relative to the largest number: fp32 sums in another order; the others round weights and results once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
MASKS = ("causal", "random", "window", "left")
# Nothing waits for the device in any of these tests: emulated, every wait fails with this error.
settled = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Few rows and many, keys in one part and in several, heads alone and in groups, all instances of the kernels.
cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 4),
        "tokens": st.sampled_from([1, 2, 7, 40, 150, 300]),
        "past": st.sampled_from([0, 1, 5, 300, 900]),
        "kv_heads": st.integers(1, 3),
        "group": st.sampled_from([1, 2, 3, 4, 7, 18]),
        "size": st.sampled_from([2, 8, 30, 64, 96, 128, 136, 256]),
        "share": st.sampled_from([0.0, 0.2, 0.5, 1.0]),
        "padding": st.sampled_from([0, 0, 5]),
        "mask": st.sampled_from(MASKS),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "seed": st.integers(0, 1000),
    }
)
PLAIN = {"batch": 1, "tokens": 4, "past": 3, "kv_heads": 2, "group": 2, "size": 8, "share": 1.0, "padding": 0}
PLAIN |= {"mask": "causal", "dtype": torch.float32, "seed": 1}


@pytest.fixture(autouse=True)
def _every_wait_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRC_EMULATED_ERROR", "700")


def _visible(case: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    """Draw a bool [batch, 1, tokens, keys] in which every token sees itself."""
    batch, tokens, past = case["batch"], case["tokens"], case["past"]
    visible = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past).expand(batch, 1, -1, -1).clone()
    if case["mask"] == "random":
        visible &= torch.rand(batch, 1, 1, past + tokens, generator=generator) < 0.8
    elif case["mask"] == "window":
        visible &= torch.ones(tokens, past + tokens, dtype=torch.bool).triu(past - 20)
    elif case["mask"] == "left":
        begin = torch.randint(past + tokens, (batch, 1, 1, 1), generator=generator)
        visible &= torch.arange(past + tokens) >= begin
    return visible | torch.eye(tokens, past + tokens, dtype=torch.bool).roll(past, dims=-1)


def _draw(case: dict[str, Any]) -> tuple[list[torch.Tensor], torch.Tensor, dict[str, Any]]:
    """Return inputs of the eager operator, the mask as ONNX adds it, and the node's attributes."""
    generator = torch.Generator().manual_seed(case["seed"])
    batch, tokens, past, dtype = case["batch"], case["tokens"], case["past"], case["dtype"]
    heads, kv_heads, size = case["group"] * case["kv_heads"], case["kv_heads"], case["size"]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows, _ = irc.select_rows(torch.rand(batch, tokens, generator=generator) < case["share"])
    visible = _visible(case, generator)
    q, new = random(1, rows.shape[1], heads * size), [random(batch, tokens, kv_heads * size) for _ in "kv"]
    old = [random(batch, kv_heads, past, size) for _ in "kv"]
    least = -3e4 if dtype == torch.float16 else -1e30
    added = torch.zeros(batch, tokens, past + tokens).masked_fill(~visible[:, 0], least).to(dtype)
    scale = float(np.float32(size**-0.5))
    return [q, rows, *new, *old, visible], added, {"heads": heads, "kv_heads": kv_heads, "scale": scale}


def _attend(run: NodeRunner, inputs: list[torch.Tensor], added: torch.Tensor, **attributes: Any) -> list[torch.Tensor]:
    return run("RoutedAttention", [*inputs[:6], added], [added.dtype] * 3, **attributes)


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    if expected.numel():
        scale = max(1.0, expected.abs().max().item())
        assert (found.float() - expected).abs().max().item() <= TOLERANCE[found.dtype] * scale


@settled
@given(case=cases)
def test_attention_equals_the_reference_in_float32(run: NodeRunner, case: dict[str, Any]) -> None:
    inputs, added, attributes = _draw(case)
    wide = [x.float() if x.is_floating_point() else x for x in inputs]
    expected = irc.routed_attention(*wide, attributes["heads"], attributes["scale"])
    real = inputs[1].shape[1]
    inputs[0] = torch.nn.functional.pad(inputs[0], (0, 0, 0, case["padding"]), value=torch.nan)
    inputs[1] = torch.nn.functional.pad(inputs[1], (0, 0, 0, case["padding"]), value=-1)
    y, *caches = _attend(run, inputs, added, **attributes)
    _close(y[:, :real], expected[0])
    assert (y[:, real:] == 0).all()
    for cache, reference in zip(caches, expected[1:], strict=True):
        assert torch.equal(cache, reference.to(case["dtype"])), "keys and values are copied"


@settled
@given(case=cases, room=st.integers(1, 70))
def test_a_cache_with_room_is_written_in_place(run: NodeRunner, case: dict[str, Any], room: int) -> None:
    """Past and present in the same memory; nothing but the new tokens is written, and places behind are not read."""
    inputs, added, attributes = _draw(case)
    expected = _attend(run, inputs, added, **attributes)
    caches = [torch.nn.functional.pad(x, (0, 0, 0, case["tokens"] + room), value=torch.nan) for x in inputs[4:6]]
    given_ones = [*inputs[:4], *caches, added]
    session = run._session("RoutedAttention", tuple(x.dtype for x in given_ones), (added.dtype,) * 3, attributes)
    binding = session.io_binding()
    for index, x in enumerate(given_ones[:2] + [x.contiguous() for x in given_ones[2:]]):
        kind = KINDS.get(x.dtype, TensorProto.INT64)
        binding.bind_input(f"x{index}", "cpu", 0, kind, tuple(x.shape), x.data_ptr())
    y = torch.empty_like(inputs[0])
    for index, x in enumerate([y, *caches]):
        place = (0, KINDS[x.dtype], tuple(x.shape), x.data_ptr()) if x.numel() else ()
        binding.bind_output(f"y{index}", "cpu", *place)
    session.run_with_iobinding(binding)
    assert torch.equal(y, expected[0]), "the same numbers in the same order"
    for cache, whole in zip(caches, expected[1:], strict=True):
        assert torch.equal(cache[:, :, : whole.shape[2]], whole)
        assert cache[:, :, whole.shape[2] :].isnan().all()


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_cache_with_room_is_copied_where_present_is_other_memory(run: NodeRunner, tokens: int) -> None:
    inputs, added, attributes = _draw(PLAIN | {"batch": 2, "tokens": tokens, "past": 9})
    expected = _attend(run, inputs, added, **attributes)
    roomy = [torch.nn.functional.pad(x, (0, 0, 0, tokens + 3), value=torch.nan) for x in inputs[4:6]]
    y, *caches = _attend(run, [*inputs[:4], *roomy], added, **attributes)
    assert torch.equal(y, expected[0])
    for cache, whole, given_one in zip(caches, expected[1:], roomy, strict=True):
        assert cache.shape == given_one.shape
        assert torch.equal(cache[:, :, : 9 + tokens], whole)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_key_head_may_have_more_query_heads_than_a_block_has_slots(run: NodeRunner, tokens: int) -> None:
    """They come in shares of 16 with few rows, of 64 with many; the last is smaller."""
    inputs, added, attributes = _draw(PLAIN | {"tokens": tokens, "group": 135})
    expected = irc.routed_attention(*inputs, attributes["heads"], attributes["scale"])
    _close(_attend(run, inputs, added, **attributes)[0], expected[0])


@pytest.mark.parametrize("tokens", [1, 32, 33, 64, 65])
@pytest.mark.parametrize("keys", [65, 127, 128, 129, 256, 257])
def test_a_block_of_keys_or_a_tile_of_queries_may_end_anywhere(run: NodeRunner, tokens: int, keys: int) -> None:
    """Keys come in blocks of 64 and splits of 128 or more; the last may be full, or hold one alone."""
    inputs, added, attributes = _draw(PLAIN | {"batch": 2, "tokens": tokens, "past": keys - tokens, "seed": keys})
    expected = irc.routed_attention(*inputs, attributes["heads"], attributes["scale"])
    _close(_attend(run, inputs, added, **attributes)[0], expected[0])


# Few rows, their keys in one part and in several; many rows.
@pytest.mark.parametrize(("tokens", "past"), [(1, 3), (5, 600), (200, 3)])
@pytest.mark.parametrize("least", [-1e30, -torch.inf])
def test_a_row_that_sees_nothing_is_finite_and_nan_stays_in_its_head(
    run: NodeRunner, tokens: int, past: int, least: float
) -> None:
    inputs, added, attributes = _draw(PLAIN | {"tokens": tokens, "past": past, "group": 1})
    added[0, 0] = least
    y, *_ = _attend(run, inputs, added, **attributes)
    assert torch.isfinite(y).all()
    inputs[0][0, 0, 0] = torch.nan
    added[0, 0] = 0
    y, *_ = _attend(run, inputs, added, **attributes)
    assert torch.isnan(y[0, 0, :8]).all(), "the head whose query is NaN"
    assert torch.isfinite(y[0, 0, 8:]).all()
    assert torch.isfinite(y[0, 1:]).all()


@pytest.mark.parametrize(("tokens", "past"), [(1, 3), (5, 600), (200, 3)])
def test_nan_stays_in_its_sequence(run: NodeRunner, tokens: int, past: int) -> None:
    inputs, added, attributes = _draw(PLAIN | {"batch": 3, "tokens": tokens, "past": past})
    whole = _attend(run, inputs, added, **attributes)[0].unflatten(1, (3, tokens))
    for index in (2, 3, 4, 5):
        inputs[index][1] = torch.nan
    y = _attend(run, inputs, added, **attributes)[0].unflatten(1, (3, tokens))
    assert torch.isnan(y[0, 1]).all()
    assert torch.equal(y[0, ::2], whole[0, ::2])


@pytest.mark.parametrize("tokens", [3, 90])
def test_a_row_outside_of_its_tensor_is_nothing(run: NodeRunner, tokens: int) -> None:
    """The host does not look at rows: others are right, and no memory outside is touched."""
    inputs, added, attributes = _draw(PLAIN | {"batch": 2, "tokens": tokens})
    whole = _attend(run, inputs, added, **attributes)[0]
    for place, pair in ((1, (0, tokens)), (tokens, (1, -1)), (2 * tokens - 1, (2, 0))):
        inputs[1][0, place] = torch.tensor(pair)
        whole[0, place] = 0
    assert torch.equal(_attend(run, inputs, added, **attributes)[0], whole)


def test_a_batch_of_any_size_has_its_rows_in_tiles(run: NodeRunner) -> None:
    """More sequences than a block has threads, some without a row."""
    inputs, added, attributes = _draw(PLAIN | {"batch": 300, "tokens": 5, "past": 0, "share": 0.3})
    expected = irc.routed_attention(*inputs, attributes["heads"], attributes["scale"])
    for found, reference in zip(_attend(run, inputs, added, **attributes), expected, strict=True):
        _close(found, reference)


def test_keys_that_no_row_may_see_are_not_read(run: NodeRunner) -> None:
    """Beyond what the rows see, keys and values are NaN, which would show."""
    for tokens, past, begin, end in ((1, 2000, 700, 800), (64, 512, 128, 256)):
        inputs, added, attributes = _draw(PLAIN | {"tokens": tokens, "past": past})
        added[:] = -1e30
        added[:, :, begin:end] = 0
        for index in (4, 5):
            inputs[index][:, :, : begin - 64] = torch.nan
            inputs[index][:, :, end + 64 :] = torch.nan
        y, *_ = _attend(run, inputs, added, **attributes)
        assert torch.isfinite(y).all()


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[:, :-1], "q is"),
        (1, lambda t: t[:, :, :1], r"expected \[1, n, 2\]"),
        (2, lambda t: t[:, :-1], "k is"),
        (4, lambda t: t[:, :, :-1], "past keys are"),
        (6, lambda t: t[:, :, :-1], r"past keys are \[1, 2, 3, 8\], the mask \[1, 4, 6\] says 2 past tokens and 4 new"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    run: NodeRunner, index: int, change: Callable[..., Any], message: str
) -> None:
    inputs, added, attributes = _draw(PLAIN)
    inputs[6] = added
    inputs[index] = change(inputs[index])
    with pytest.raises(Exception, match=message):
        run("RoutedAttention", inputs, [torch.float32] * 3, **attributes)


def test_heads_that_are_too_large_are_refused(run: NodeRunner) -> None:
    inputs, added, attributes = _draw(PLAIN | {"size": 264})
    with pytest.raises(Exception, match="heads have 264 numbers; the CUDA kernel takes up to 256"):
        _attend(run, inputs, added, **attributes)
