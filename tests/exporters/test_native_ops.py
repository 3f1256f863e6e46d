"""The native kernels equal the eager dialect on random shapes, and refuse what does not fit with a sentence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from exporters.onnx_ops import DOMAIN, VERSION, function_protos
from irc.runtime.native import installed_library
from passes import dialect  # noqa: F401 - registers the operators

LIBRARY = installed_library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the native operator library is not installed")
irc = torch.ops.irc
KINDS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
KINDS |= {torch.int64: TensorProto.INT64, torch.bool: TensorProto.BOOL}
# Relative to the largest number: fp32 sums in another order, the others round their results once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

_sessions: dict[Any, Any] = {}


def _session(op: str, kinds: Sequence[Any], outputs: Sequence[Any], attributes: dict[str, Any], native: bool) -> Any:
    """A model of one node; its inputs have no fixed shape."""
    key = op, tuple(kinds), tuple(attributes.items()), native
    if key not in _sessions:
        names, results = [f"x{i}" for i in range(len(kinds))], [f"y{i}" for i in range(len(outputs))]
        node = helper.make_node(op, names, results, domain=DOMAIN, **attributes)
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(n, KINDS[kind], None) for n, kind in zip(names, kinds, strict=True)],
            [helper.make_tensor_value_info(n, KINDS[kind], None) for n, kind in zip(results, outputs, strict=True)],
        )
        sets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)]
        model = helper.make_model(graph, opset_imports=sets, ir_version=10, functions=function_protos({op}))
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if native:
            assert LIBRARY is not None
            options.register_custom_ops_library(str(LIBRARY.path))
        _sessions[key] = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return _sessions[key]


def _run(op: str, inputs: Sequence[Any], outputs: Sequence[Any], native: bool = True, **attributes: Any) -> list[Any]:
    session = _session(op, [x.dtype for x in inputs], outputs, attributes, native)
    binding = session.io_binding()
    kept = []
    for index, x in enumerate(inputs):
        x = x.contiguous()
        kept.append(x)
        binding.bind_input(f"x{index}", "cpu", 0, KINDS[x.dtype], tuple(x.shape), x.data_ptr())
    for index in range(len(outputs)):
        binding.bind_output(f"y{index}", "cpu")
    session.run_with_iobinding(binding)
    return [_tensor(value, kind) for value, kind in zip(binding.get_outputs(), outputs, strict=True)]


def _tensor(value: Any, kind: torch.dtype) -> torch.Tensor:
    if kind == torch.bfloat16:
        if 0 in value.shape():
            return torch.empty(value.shape(), dtype=kind)
        return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).clone()
    return torch.from_numpy(value.numpy().copy())


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if expected.numel():
        scale = max(1.0, expected.float().abs().max().item())
        assert (found.float() - expected.float()).abs().max().item() <= TOLERANCE[found.dtype] * scale


def test_the_library_is_installed_where_there_is_a_compiler() -> None:
    assert LIBRARY is not None or shutil.which(os.environ.get("CXX", "c++")) is None, "make native builds it"


cases = st.fixed_dictionaries(
    {
        "batch": st.integers(0, 3),
        "tokens": st.integers(0, 300),
        "width": st.sampled_from([1, 3, 16, 100, 257]),
        "share": st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "seed": st.integers(0, 1000),
    }
)


@needs_library
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases)
def test_rows_are_moved_exactly(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    shape, dtype = (case["batch"], case["tokens"], case["width"]), case["dtype"]
    mask = torch.rand(shape[:2], generator=generator) < case["share"]
    x, base = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    executed, skipped = _run("SelectRows", [mask], [torch.int64] * 2)
    drawn = torch.randint(0, 4, shape[:2], generator=generator)
    difference = torch.where(mask, torch.tensor([torch.nan, 0.0, -0.0, 1.0])[drawn], -(drawn + 1.0))
    decided = _run("DecideRows", [difference], [torch.int64] * 2)
    for found, same, expected in zip((executed, skipped), decided, irc.select_rows(mask), strict=True):
        assert torch.equal(found, expected)
        assert torch.equal(same, expected)
    (y,) = _run("Compact", [x, executed], [dtype])
    assert torch.equal(y, irc.compact(x, executed))
    (z,) = _run("Scatter", [y, executed, base], [dtype])
    assert torch.equal(z, irc.scatter(y, executed, base))
    (z,) = _run("ScatterAdd", [y, executed, base], [dtype])
    assert torch.equal(z, irc.scatter_add(y, executed, base)), "one rounding, as in PyTorch"


@needs_library
def test_every_byte_but_zero_is_true() -> None:
    mask = torch.tensor([[2, 0, 255, 1]], dtype=torch.uint8).view(torch.bool)
    executed, skipped = _run("SelectRows", [mask], [torch.int64] * 2)
    assert executed.tolist() == [[[0, 0], [0, 2], [0, 3]]]
    assert skipped.tolist() == [[[0, 1]]]


attention = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "tokens": st.sampled_from([1, 2, 7, 64, 300]),
        "past": st.sampled_from([0, 1, 5, 300]),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "size": st.sampled_from([2, 8, 30, 64]),
        "share": st.sampled_from([0.0, 0.2, 0.5, 1.0]),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "seed": st.integers(0, 1000),
    }
)


def _attention_inputs(case: dict[str, Any]) -> tuple[list[torch.Tensor], torch.Tensor, dict[str, Any]]:
    """Inputs of the eager operator, the mask as ONNX adds it, and attributes; every token sees itself."""
    generator = torch.Generator().manual_seed(case["seed"])
    batch, tokens, past, dtype = case["batch"], case["tokens"], case["past"], case["dtype"]
    heads, kv_heads, size = case["group"] * case["kv_heads"], case["kv_heads"], case["size"]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows, _ = irc.select_rows(torch.rand(batch, tokens, generator=generator) < case["share"])
    mask = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past).expand(batch, 1, -1, -1).clone()
    mask &= (torch.rand(batch, 1, 1, past + tokens, generator=generator) < 0.8) | torch.eye(
        tokens, past + tokens, dtype=torch.bool
    ).roll(past, dims=-1)
    q = random(1, rows.shape[1], heads * size)
    k, v = random(batch, tokens, kv_heads * size), random(batch, tokens, kv_heads * size)
    past_k, past_v = random(batch, kv_heads, past, size), random(batch, kv_heads, past, size)
    least = -3e4 if dtype == torch.float16 else -1e30
    added = torch.zeros(batch, tokens, past + tokens).masked_fill(~mask[:, 0], least).to(dtype)
    scale = float(np.float32(size**-0.5))
    return [q, rows, k, v, past_k, past_v, mask], added, {"heads": heads, "kv_heads": kv_heads, "scale": scale}


@needs_library
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=attention)
def test_attention_equals_the_reference_in_float32(case: dict[str, Any]) -> None:
    inputs, added, attributes = _attention_inputs(case)
    wide = [x.float() if x.is_floating_point() else x for x in inputs]
    expected = irc.routed_attention(*wide, attributes["heads"], attributes["scale"])
    found = _run("RoutedAttention", [*inputs[:6], added], [case["dtype"]] * 3, **attributes)
    _close(found[0], expected[0].to(case["dtype"]))
    for cache, reference in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(cache, reference.to(case["dtype"])), "keys and values are copied"


@needs_library
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=attention, room=st.integers(1, 70))
def test_a_cache_with_room_is_written_in_place(case: dict[str, Any], room: int) -> None:
    """Past and present in the same memory; nothing but the new tokens is written, and places behind are not read."""
    inputs, added, attributes = _attention_inputs(case)
    expected = _run("RoutedAttention", [*inputs[:6], added], [case["dtype"]] * 3, **attributes)
    session = _session(
        "RoutedAttention", [x.dtype for x in [*inputs[:6], added]], [case["dtype"]] * 3, attributes, True
    )
    past, tokens = case["past"], case["tokens"]
    caches = [torch.nn.functional.pad(x, (0, 0, 0, tokens + room), value=torch.nan) for x in inputs[4:6]]
    binding = session.io_binding()
    for index, x in enumerate([*inputs[:4], *caches, added]):
        binding.bind_input(f"x{index}", "cpu", 0, KINDS[x.dtype], tuple(x.shape), x.data_ptr())
    for index, x in enumerate(caches, start=1):
        binding.bind_output(f"y{index}", "cpu", 0, KINDS[x.dtype], tuple(x.shape), x.data_ptr())
    binding.bind_output("y0", "cpu")
    session.run_with_iobinding(binding)
    _close(_tensor(binding.get_outputs()[-1], case["dtype"]), expected[0])
    for cache, whole in zip(caches, expected[1:], strict=True):
        assert torch.equal(cache[:, :, : past + tokens], whole)
        assert cache[:, :, past + tokens :].isnan().all()


@needs_library
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_cache_with_room_is_copied_where_present_is_other_memory(tokens: int) -> None:
    case = {"batch": 2, "tokens": tokens, "past": 9, "kv_heads": 2, "group": 1, "size": 8, "share": 1.0}
    inputs, added, attributes = _attention_inputs(case | {"dtype": torch.float32, "seed": 1})
    expected = _run("RoutedAttention", [*inputs[:6], added], [torch.float32] * 3, **attributes)
    roomy = [torch.nn.functional.pad(x, (0, 0, 0, tokens + 3), value=torch.nan) for x in inputs[4:6]]
    found = _run("RoutedAttention", [*inputs[:4], *roomy, added], [torch.float32] * 3, **attributes)
    assert torch.equal(found[0], expected[0])
    for cache, whole, given_one in zip(found[1:], expected[1:], roomy, strict=True):
        assert cache.shape == given_one.shape
        assert torch.equal(cache[:, :, : 9 + tokens], whole)


@needs_library
@pytest.mark.parametrize("places", [8, 12])
def test_a_cache_of_fewer_places_than_tokens_is_refused(places: int) -> None:
    """Fewer than the past, or some room and not enough: what lies behind would be read or written."""
    case = {"batch": 1, "tokens": 4, "past": 9, "kv_heads": 2, "group": 1, "size": 8, "share": 1.0}
    inputs, added, attributes = _attention_inputs(case | {"dtype": torch.float32, "seed": 1})
    short = [torch.zeros(1, 2, places, 8) for _ in "kv"]
    with pytest.raises(Exception, match=r"the mask \[1, 4, 13\] says 9 past tokens and 4 new ones"):
        _run("RoutedAttention", [*inputs[:4], *short, added], [torch.float32] * 3, **attributes)


@needs_library
@pytest.mark.parametrize("tokens", [1, 4, 5, 96, 97])
@pytest.mark.parametrize("keys", [255, 256, 257, 512, 513])
def test_a_block_of_keys_or_a_part_of_the_queries_may_end_anywhere(tokens: int, keys: int) -> None:
    """Keys come in blocks of 256, queries in parts of 96; the last may be full, or hold one alone."""
    case = {"batch": 2, "tokens": tokens, "past": keys - tokens, "kv_heads": 1, "group": 3, "size": 8, "share": 1.0}
    inputs, added, attributes = _attention_inputs(case | {"dtype": torch.float32, "seed": keys})
    expected = irc.routed_attention(*inputs, attributes["heads"], attributes["scale"])
    _close(_run("RoutedAttention", [*inputs[:6], added], [torch.float32] * 3, **attributes)[0], expected[0])


@needs_library
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_attention_passes_nan_on_and_survives_a_row_that_sees_nothing(tokens: int) -> None:
    case = {
        "batch": 1,
        "past": 3,
        "kv_heads": 2,
        "group": 1,
        "size": 8,
        "share": 1.0,
        "dtype": torch.float32,
        "seed": 1,
    }
    inputs, added, attributes = _attention_inputs(case | {"tokens": tokens})
    added[0, 0] = -1e30
    y, _, _ = _run("RoutedAttention", [*inputs[:6], added], [torch.float32] * 3, **attributes)
    assert torch.isfinite(y).all()
    inputs[0][0, 0, 0] = torch.nan
    added[0, 0] = 0
    y, _, _ = _run("RoutedAttention", [*inputs[:6], added], [torch.float32] * 3, **attributes)
    assert torch.isnan(y[0, 0, :8]).all(), "the head whose query is NaN"
    assert torch.isfinite(y[0, 0, 8:]).all()
    assert torch.isfinite(y[0, 1:]).all()


def _rows(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(1, len(pairs), 2)


x3 = torch.zeros(1, 3, 4)
WRONG: dict[str, tuple[str, list[torch.Tensor], str]] = {
    "a row past the end": ("Compact", [x3, _rows((0, 3))], r"Compact: row \(0, 3\) lies outside of \[1, 3\]"),
    "a negative row": ("Compact", [x3, _rows((-1, 0))], "lies outside"),
    "rows out of order": ("Compact", [x3, _rows((0, 2), (0, 1))], "not in order"),
    "a row twice": ("ScatterAdd", [x3[:, :2], _rows((0, 1), (0, 1)), x3], "comes twice"),
    "rows that are no pairs": ("Compact", [x3, torch.zeros(1, 2, 3, dtype=torch.int64)], r"expected \[1, n, 2\]"),
    "too few values": ("Scatter", [x3[:, :1], _rows((0, 0), (0, 1)), x3], r"y is \[1, 1, 4\], expected \[1, 2, 4\]"),
    "another width": ("Scatter", [torch.zeros(1, 1, 5), _rows((0, 0)), x3], "expected"),
    "another rank": ("Compact", [torch.zeros(3, 4), _rows((0, 0))], "input 0 has 2 dimensions, expected 3"),
    "a mask of the wrong rank": ("SelectRows", [torch.ones(3, dtype=torch.bool)], "1 dimensions, expected 2"),
    "logits of the wrong rank": ("DecideRows", [torch.ones(1, 2, 3)], "3 dimensions, expected 2"),
}


@needs_library
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error_that_says_so(name: str) -> None:
    op, inputs, message = WRONG[name]
    outputs = [torch.int64] * 2 if op in ("SelectRows", "DecideRows") else [torch.float32]
    with pytest.raises(Exception, match=message):
        _run(op, inputs, outputs)


@needs_library
@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[:, :-1], "q is"),
        (2, lambda t: t[:, :-1], "k is|row"),
        (4, lambda t: t[:, :, :-1], "past keys are|k is"),
        (6, lambda t: t[:, :, :-1], r"past keys are \[1, 2, 3, 8\], the mask \[1, 4, 6\] says 2 past tokens and 4 new"),
    ],
)
def test_attention_refuses_shapes_that_do_not_fit(index: int, change: Callable[..., Any], message: str) -> None:
    case = {"batch": 1, "tokens": 4, "past": 3, "kv_heads": 2, "group": 2, "size": 8, "share": 1.0}
    inputs, added, attributes = _attention_inputs(case | {"dtype": torch.float32, "seed": 0})
    inputs[6] = added
    inputs[index] = change(inputs[index])
    with pytest.raises(Exception, match=message):
        _run("RoutedAttention", inputs, [torch.float32] * 3, **attributes)


@needs_library
def test_heads_that_do_not_divide_are_refused_when_the_model_is_loaded() -> None:
    kinds = [torch.float32, torch.int64, *[torch.float32] * 5]
    with pytest.raises(Exception, match="kv_heads does not divide heads"):
        _session("RoutedAttention", kinds, [torch.float32] * 3, {"heads": 3, "kv_heads": 2, "scale": 1.0}, True)


@needs_library
def test_sixteen_bit_numbers_round_as_in_pytorch() -> None:
    """All 65,536 fp16 and bf16 numbers through a sum with zero and with a neighbour."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype).reshape(1, 1, -1)
        for base in (torch.zeros_like(x), x.roll(1)):
            (found,) = _run("ScatterAdd", [x, _rows((0, 0)), base], [dtype])
            expected = base + x
            same = (found == expected) | (found.isnan() & expected.isnan())
            assert same.all(), (dtype, x[~same][:5], base[~same][:5], found[~same][:5], expected[~same][:5])
