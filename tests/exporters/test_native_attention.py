"""RoutedAttention's CPU kernel against the eager operator in float32, in place, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irc.bench.kernels.check import DTYPES, NodeRunner
from irc.runtime.native import installed_library

LIBRARY = installed_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native operator library is not installed")
cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "tokens": st.sampled_from([1, 2, 7, 64, 300]),
        "past": st.sampled_from([0, 1, 5, 300]),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "size": st.sampled_from([2, 8, 30, 64]),
        "share": st.sampled_from([0.0, 0.2, 0.5, 1.0]),
        "hidden": st.sampled_from([0.0, 0.2]),
        "window": st.sampled_from([0, 21]),
        "left": st.booleans(),
        "dtype": st.sampled_from(list(DTYPES.values())),
        "seed": st.integers(0, 1000),
    }
)


@pytest.fixture(scope="module")
def run() -> NodeRunner:
    assert LIBRARY is not None
    return NodeRunner(LIBRARY.path, "CPUExecutionProvider")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=cases)
def test_attention_equals_the_reference_in_float32(
    run: NodeRunner, attention: Callable, attend: Callable, is_near: Callable, sizes: dict[str, Any]
) -> None:
    case = attention(**sizes)
    assert is_near(case, attend(run, case))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=cases, room=st.integers(1, 70))
def test_a_cache_with_room_is_written_in_place(
    run: NodeRunner,
    attention: Callable,
    attend_in_place: Callable,
    is_near: Callable,
    sizes: dict[str, Any],
    room: int,
) -> None:
    """Past and present in the same memory: only the new tokens are written, and later places are not read."""
    case = attention(**sizes)
    y, *caches = attend_in_place(run, case, room)
    assert is_near(case, [y, *(cache[:, :, :-room] for cache in caches)])
    assert all(cache[:, :, -room:].isnan().all() for cache in caches)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_cache_with_room_is_copied_where_present_is_other_memory(
    run: NodeRunner, attention: Callable, attend: Callable, tokens: int
) -> None:
    case = attention(batch=2, tokens=tokens, past=9, group=1)
    whole = attend(run, case)
    roomy = [torch.nn.functional.pad(x, (0, 0, 0, tokens + 3), value=torch.nan) for x in case.inputs[4:6]]
    case.inputs[4:6] = roomy
    found = attend(run, case)
    assert torch.equal(found[0], whole[0])
    for cache, expected, given_one in zip(found[1:], whole[1:], roomy, strict=True):
        assert cache.shape == given_one.shape
        assert torch.equal(cache[:, :, : 9 + tokens], expected)


@pytest.mark.parametrize("places", [8, 12])
def test_a_cache_of_fewer_places_than_tokens_is_refused(
    run: NodeRunner, attention: Callable, attend: Callable, places: int
) -> None:
    """Room for fewer tokens than the past has, or for too few new ones: memory behind would be read or written."""
    case = attention(past=9)
    case.inputs[4:6] = [torch.zeros(1, 2, places, 8) for _ in "kv"]
    with pytest.raises(Exception, match=r"the mask \[1, 4, 13\] says 9 past tokens and 4 new ones"):
        attend(run, case)


@pytest.mark.parametrize("tokens", [1, 4, 5, 96, 97])
@pytest.mark.parametrize("keys", [255, 256, 257, 512, 513])
def test_a_block_of_keys_or_a_part_of_the_queries_may_end_anywhere(
    run: NodeRunner, attention: Callable, attend: Callable, is_near: Callable, tokens: int, keys: int
) -> None:
    """Keys come in blocks of 256, queries in parts of 96; the last may be full or hold a single one."""
    sizes = {"batch": 2, "tokens": tokens, "past": keys - tokens, "kv_heads": 1, "group": 3}
    case = attention(keys, **sizes, hidden=0.2)
    assert is_near(case, attend(run, case))


@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_attention_passes_nan_on_and_survives_a_row_that_sees_nothing(
    run: NodeRunner, attention: Callable, attend: Callable, tokens: int
) -> None:
    case = attention(tokens=tokens, group=1)
    case.inputs[6][0, 0] = -1e30
    assert torch.isfinite(attend(run, case)[0]).all()
    case.inputs[0][0, 0, 0] = torch.nan
    case.inputs[6][0, 0] = 0
    y, *_ = attend(run, case)
    assert torch.isnan(y[0, 0, :8]).all(), "the head whose query is NaN"
    assert torch.isfinite(y[0, 0, 8:]).all()
    assert torch.isfinite(y[0, 1:]).all()


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[:, :-1], "q is"),
        (2, lambda t: t[:, :-1], "k is|row"),
        (4, lambda t: t[:, :, :-1], "past keys are|k is"),
        (6, lambda t: t[:, :, :-1], r"past keys are \[1, 2, 3, 8\], the mask \[1, 4, 6\] says 2 past tokens and 4 new"),
    ],
)
def test_attention_refuses_shapes_that_do_not_fit(
    run: NodeRunner, attention: Callable, attend: Callable, index: int, change: Callable[..., Any], message: str
) -> None:
    case = attention()
    case.inputs[index] = change(case.inputs[index])
    with pytest.raises(Exception, match=message):
        attend(run, case)


def test_heads_that_do_not_divide_are_refused_when_the_model_is_loaded(run: NodeRunner) -> None:
    kinds = (torch.float32, torch.int64, *[torch.float32] * 5)
    with pytest.raises(Exception, match="kv_heads does not divide heads"):
        run._session("RoutedAttention", kinds, (torch.float32,) * 3, {"heads": 3, "kv_heads": 2, "scale": 1.0})
