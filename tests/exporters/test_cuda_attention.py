"""RoutedAttention's CUDA kernels, thread by thread on the host (conftest's `run`), against the eager operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irc.bench.kernels.check import DTYPES, NodeRunner

# No test here waits for the device: in emulation, every wait fails with this error.
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
        "hidden": st.sampled_from([0.0, 0.2]),
        "window": st.sampled_from([0, 21]),
        "left": st.booleans(),
        "dtype": st.sampled_from(list(DTYPES.values())),
        "seed": st.integers(0, 1000),
    }
)


@pytest.fixture(autouse=True)
def _every_wait_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRC_EMULATED_ERROR", "700")


@settled
@given(sizes=cases)
def test_attention_equals_the_reference_in_float32(
    run: NodeRunner, attention: Callable, attend: Callable, is_near: Callable, sizes: dict[str, Any]
) -> None:
    case = attention(**sizes)
    # Padding rows hold undefined values.
    case.inputs[0][:, case.expected[0].shape[1] :] = torch.nan
    assert is_near(case, attend(run, case))


@settled
@given(sizes=cases, room=st.integers(1, 70))
def test_a_cache_with_room_is_written_in_place(
    run: NodeRunner, attention: Callable, attend: Callable, attend_in_place: Callable, sizes: dict[str, Any], room: int
) -> None:
    """Past and present in the same memory: only the new tokens are written, and later places are not read."""
    case = attention(**sizes)
    expected = attend(run, case)
    y, *caches = attend_in_place(run, case, room)
    assert torch.equal(y, expected[0]), "the same numbers in the same order"
    for cache, whole in zip(caches, expected[1:], strict=True):
        assert torch.equal(cache[:, :, :-room], whole)
        assert cache[:, :, -room:].isnan().all()


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_cache_with_room_is_copied_where_present_is_other_memory(
    run: NodeRunner, attention: Callable, attend: Callable, tokens: int
) -> None:
    case = attention(batch=2, tokens=tokens, past=9)
    expected = attend(run, case)
    roomy = [torch.nn.functional.pad(x, (0, 0, 0, tokens + 3), value=torch.nan) for x in case.inputs[4:6]]
    case.inputs[4:6] = roomy
    y, *caches = attend(run, case)
    assert torch.equal(y, expected[0])
    for cache, whole, given_one in zip(caches, expected[1:], roomy, strict=True):
        assert cache.shape == given_one.shape
        assert torch.equal(cache[:, :, : 9 + tokens], whole)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_key_head_may_have_more_query_heads_than_a_block_has_slots(
    run: NodeRunner, attention: Callable, attend: Callable, is_near: Callable, tokens: int
) -> None:
    """They come in shares of 16 with few rows and of 64 with many; the last is smaller."""
    case = attention(tokens=tokens, group=135)
    assert is_near(case, attend(run, case))


@pytest.mark.parametrize("tokens", [1, 32, 33, 64, 65])
@pytest.mark.parametrize("keys", [65, 127, 128, 129, 256, 257])
def test_a_block_of_keys_or_a_tile_of_queries_may_end_anywhere(
    run: NodeRunner, attention: Callable, attend: Callable, is_near: Callable, tokens: int, keys: int
) -> None:
    """Keys come in blocks of 64 and splits of 128 or more; the last may be full or hold a single one."""
    case = attention(keys, batch=2, tokens=tokens, past=keys - tokens)
    assert is_near(case, attend(run, case))


@pytest.mark.parametrize("before", [0, 1, 10, 63, 64, 65])
def test_a_window_may_begin_just_before_a_split_of_the_keys(
    run: NodeRunner, attention: Callable, attend: Callable, is_near: Callable, before: int
) -> None:
    """The 1100 keys are in splits of 192, the last from 960 on; no key counts twice."""
    case = attention(tokens=1, past=1099, window=1100 - 960 + before)
    assert is_near(case, attend(run, case))


# Few rows, their keys in one part and in several; many rows.
@pytest.mark.parametrize(("tokens", "past"), [(1, 3), (5, 600), (200, 3)])
@pytest.mark.parametrize("least", [-1e30, -torch.inf])
def test_a_row_that_sees_nothing_is_finite_and_nan_stays_in_its_head(
    run: NodeRunner, attention: Callable, attend: Callable, tokens: int, past: int, least: float
) -> None:
    case = attention(tokens=tokens, past=past, group=1)
    case.inputs[6][0, 0] = least
    assert torch.isfinite(attend(run, case)[0]).all()
    case.inputs[0][0, 0, 0] = torch.nan
    case.inputs[6][0, 0] = 0
    y, *_ = attend(run, case)
    assert torch.isnan(y[0, 0, :8]).all(), "the head whose query is NaN"
    assert torch.isfinite(y[0, 0, 8:]).all()
    assert torch.isfinite(y[0, 1:]).all()


@pytest.mark.parametrize(("tokens", "past"), [(1, 3), (5, 600), (200, 3)])
def test_nan_stays_in_its_sequence(
    run: NodeRunner, attention: Callable, attend: Callable, tokens: int, past: int
) -> None:
    case = attention(batch=3, tokens=tokens, past=past)
    whole = attend(run, case)[0].unflatten(1, (3, tokens))
    for index in (2, 3, 4, 5):
        case.inputs[index][1] = torch.nan
    y = attend(run, case)[0].unflatten(1, (3, tokens))
    assert torch.isnan(y[0, 1]).all()
    assert torch.equal(y[0, ::2], whole[0, ::2])


@pytest.mark.parametrize("tokens", [3, 90])
def test_a_row_outside_of_its_tensor_is_nothing(
    run: NodeRunner, attention: Callable, attend: Callable, tokens: int
) -> None:
    """The host does not read rows: the other rows are right, and no memory outside is touched."""
    case = attention(batch=2, tokens=tokens)
    whole = attend(run, case)[0]
    for place, pair in ((1, (0, tokens)), (tokens, (1, -1)), (2 * tokens - 1, (2, 0))):
        case.inputs[1][0, place] = torch.tensor(pair)
        whole[0, place] = 0
    assert torch.equal(attend(run, case)[0], whole)


def test_a_batch_of_any_size_has_its_rows_in_tiles(
    run: NodeRunner, attention: Callable, attend: Callable, is_near: Callable
) -> None:
    """More sequences than a block has threads, some without a row."""
    case = attention(batch=300, tokens=5, past=0, share=0.3)
    assert is_near(case, attend(run, case))


def test_keys_that_no_row_may_see_are_not_read(run: NodeRunner, attention: Callable, attend: Callable) -> None:
    """Keys and values that no row sees are NaN, so reading them would show."""
    for tokens, past, begin, end in ((1, 2000, 700, 800), (64, 512, 128, 256)):
        case = attention(tokens=tokens, past=past)
        case.inputs[6][:] = -1e30
        case.inputs[6][:, :, begin:end] = 0
        for cache in case.inputs[4:6]:
            cache[:, :, : begin - 64] = torch.nan
            cache[:, :, end + 64 :] = torch.nan
        assert torch.isfinite(attend(run, case)[0]).all()


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
    run: NodeRunner, attention: Callable, attend: Callable, index: int, change: Callable[..., Any], message: str
) -> None:
    case = attention()
    case.inputs[index] = change(case.inputs[index])
    with pytest.raises(Exception, match=message):
        attend(run, case)


def test_heads_that_are_too_large_are_refused(run: NodeRunner, attention: Callable, attend: Callable) -> None:
    with pytest.raises(Exception, match="heads have 264 numbers; the CUDA kernel takes up to 256"):
        attend(run, attention(size=264))
