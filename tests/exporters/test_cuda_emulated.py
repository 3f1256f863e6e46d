"""The CUDA kernels, thread by thread on the host: the same sources, compiled by the C++ compiler for the CPU provider.

What a GPU adds is not tested here: memory models, alignment traps, speed, and ONNX Runtime's CUDA provider.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from irc.bench.kernels.check import DTYPES, OPERATORS, NodeRunner, check_kernels

CPU = "CPUExecutionProvider"
F32, I64 = torch.float32, torch.int64


def test_every_kernel_equals_the_reference(library: Path) -> None:
    found = check_kernels(library, CPU, cases=40)
    assert {(each.operator, each.dtype) for each in found} == {(op, dtype) for op in OPERATORS for dtype in DTYPES}
    assert not [each for each in found if each.wrong or each.reason]


def test_the_check_itself_can_fail(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison finds a kernel that is off by one row."""
    original = NodeRunner.__call__

    def shifted(run: NodeRunner, *arguments: Any) -> list[torch.Tensor]:
        return [tensor.roll(1, dims=1) for tensor in original(run, *arguments)]

    monkeypatch.setattr(NodeRunner, "__call__", shifted)
    assert all(each.wrong for each in check_kernels(library, CPU, cases=20))


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_model_with_kernels_in_some_places_and_bodies_in_others(
    library: Path, tiny: Callable, make_pair: Callable, provider: str
) -> None:
    pair = make_pair(tiny("llama"), provider=provider)
    used = Counter(node.op_type for node in onnx.load(pair.path).graph.node if node.domain == "irc")
    assert used["DecideRows"] == used["ForecastAdd"] == used["ScatterAdd"] == 4
    assert used["RoutedAttention"] == 2
    assert (used["RoutedMatMul"], used["RoutedGate"]) == ((6, 2) if provider == "cuda" else (0, 0))
    shapes = (1, 9, 0), (1, 1, 4), (3, 7, 5), (3, 1, 6), (12, 1, 3), (1, 60, 0)
    for gates, (batch, tokens, past) in itertools.product(("mixed", "all executed", "all skipped"), shapes):
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(0, 61, (batch, tokens), generator=generator)
        mask = torch.ones(batch, past + tokens, dtype=I64)
        shape = batch, pair.cache.heads, past, pair.cache.size
        cache = [torch.randn(shape, generator=generator) for _ in range(2 * pair.cache.layers)]
        wanted, tape = pair.torch(gates, ids, mask, cache)
        for ops in (*pair.all_ops, str(library)):
            found = pair.onnx(gates, ids, mask, cache, ops=ops)
            for decision in pair.decisions:
                execute = ~(found[decision.difference] < 0)
                assert torch.equal(execute, tape[decision.unit].execute), (gates, batch, ops)
            names = ["logits", *(f"present.{n // 2}.{('key', 'value')[n % 2]}" for n in range(2 * pair.cache.layers))]
            for name, value in zip(names, wanted, strict=True):
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4, msg=f"{gates} {batch} {ops} {name}")


def test_every_byte_but_zero_is_true(run: NodeRunner) -> None:
    mask = torch.tensor([[2, 0, 255, 1]], dtype=torch.uint8).view(torch.bool)
    executed, skipped = run("SelectRows", [mask], [I64] * 2)
    assert executed.tolist() == [[[0, 0], [0, 2], [0, 3]]]
    assert skipped.tolist() == [[[0, 1]]]


def test_a_row_outside_of_its_tensor_is_left_out(run: NodeRunner) -> None:
    """The host does not read rows, and nothing outside is read or written."""
    rows = torch.tensor([[[0, 1], [0, 3], [-1, 0], [1, 0]]])
    x = torch.arange(6.0).reshape(1, 3, 2)
    (y,) = run("Compact", [x, rows], [F32])
    assert y.tolist() == [[[2, 3], [0, 0], [0, 0], [0, 0]]]
    (z,) = run("ScatterAdd", [torch.ones(1, 4, 2), rows, x], [F32])
    assert z.tolist() == [[[0, 1], [3, 4], [4, 5]]]


x3 = torch.zeros(1, 3, 4)
one_row = torch.tensor([[[0, 0]]])
WRONG: dict[str, tuple[str, list[torch.Tensor], list[torch.dtype], str]] = {
    "rows that are no pairs": ("Compact", [x3, torch.zeros(1, 2, 3, dtype=I64)], [F32], r"expected \[1, n, 2\]"),
    "too few values": ("Scatter", [x3[:, :0], one_row, x3], [F32], r"y is \[1, 0, 4\], expected \[1, 1, 4\]"),
    "another width": ("ScatterAdd", [torch.zeros(1, 1, 5), one_row, x3], [F32], r"expected \[1, 1, 4\]"),
    "another rank": ("Compact", [torch.zeros(3, 4), one_row], [F32], "input 0 has 2 dimensions, expected 3"),
    "a mask of the wrong rank": (
        "SelectRows",
        [torch.ones(3, dtype=torch.bool)],
        [I64] * 2,
        "1 dimensions, expected 2",
    ),
    "places for no pairs": ("RaggedPlaces", [torch.zeros(1, 2, 3, dtype=I64), x3], [I64] * 2, r"expected \[1, n, 2\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error_that_says_so(run: NodeRunner, name: str) -> None:
    op, inputs, outputs, message = WRONG[name]
    with pytest.raises(Exception, match=message):
        run(op, inputs, outputs)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (209, "SelectRows: the library has code for sm_80, sm_90 and not for this GPU; build it again"),
        (35, r"the NVIDIA driver is too old for CUDA \d+\.\d+, which the library was built with; update it"),
        (100, "there is no NVIDIA GPU"),
        (900, "which a CUDA graph cannot hold; run without enable_cuda_graph"),
        (700, r"an emulated error \(CUDA error 700 when waiting for the stream\)"),
    ],
)
def test_an_error_of_the_stream_is_a_status(
    run: NodeRunner, monkeypatch: pytest.MonkeyPatch, error: int, message: str
) -> None:
    mask = torch.tensor([[True, False]])
    monkeypatch.setenv("IRC_EMULATED_ERROR", str(error))
    with pytest.raises(Exception, match=message):
        run("SelectRows", [mask], [I64] * 2)
    monkeypatch.delenv("IRC_EMULATED_ERROR")
    assert run("SelectRows", [mask], [I64] * 2)[0].tolist() == [[[0, 0]]], "the next call is served"


def test_memory_that_is_used_up_is_asked_for_again_once_the_pool_is_trimmed(
    run: NodeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.tensor([[True, False]])
    monkeypatch.setenv("IRC_EMULATED_FULL", "until trimmed")
    assert run("SelectRows", [mask], [I64] * 2)[0].tolist() == [[[0, 0]]]
    for full in ("always", "recording"):  # no waiting while a CUDA graph is recorded
        monkeypatch.setenv("IRC_EMULATED_FULL", full)
        with pytest.raises(Exception, match=r"SelectRows: the GPU's memory is used up .* when asking for memory"):
            run("SelectRows", [mask], [I64] * 2)
    monkeypatch.setenv("IRC_EMULATED_FULL", "until trimmed")
    monkeypatch.setenv("IRC_EMULATED_ERROR", "700")
    with pytest.raises(Exception, match="CUDA error 700 when asking for memory"):
        run("SelectRows", [mask], [I64] * 2)


def test_only_the_number_of_rows_waits_for_the_device(run: NodeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """If every wait fails, everything runs but choices of rows and RaggedPlaces of several tokens in a batch."""
    monkeypatch.setenv("IRC_EMULATED_ERROR", "700")
    rows, x = torch.tensor([[[0, 0], [2, 0]]]), torch.ones(3, 1, 4)
    (y,) = run("Compact", [x, rows], [F32])
    run("Scatter", [y, rows, x], [F32])
    run("ScatterAdd", [y, rows, x], [F32])
    places, index = run("RaggedPlaces", [rows, x], [I64] * 2)
    assert (places.tolist(), index.tolist()) == ([[[0, 0], [2, 0]]], [[0], [0], [1]])
    run("SelectRows", [torch.ones(0, 4, dtype=torch.bool)], [I64] * 2)
    for op, inputs in (
        ("SelectRows", [torch.ones(1, 1, dtype=torch.bool)]),
        ("RaggedPlaces", [rows, torch.ones(3, 2, 4)]),
    ):
        with pytest.raises(Exception, match="waiting for the stream"):
            run(op, inputs, [I64] * 2)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (8, 1), (3, 7), (2, 300), (2, 4500)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_padded_rows_wait_for_nothing_and_end_in_rows_that_are_nothing(
    run: NodeRunner, monkeypatch: pytest.MonkeyPatch, batch: int, tokens: int, share: float
) -> None:
    """Every wait is an error here."""
    monkeypatch.setenv("IRC_EMULATED_ERROR", "700")
    generator = torch.Generator().manual_seed(tokens)
    mask = torch.rand((batch, tokens), generator=generator) < share
    both = run("SelectRows", [mask], [I64] * 2, padded=batch * tokens)
    differences = torch.where(mask, torch.nan, -1.0)
    decided = run("DecideRows", [differences], [I64] * 2, padded=batch * tokens)
    assert all(torch.equal(one, other) for one, other in zip(decided, both, strict=True))
    for rows, wanted in zip(both, torch.ops.irc.select_rows(mask), strict=True):
        assert rows.shape == (1, batch * tokens, 2)
        real = wanted.shape[1]
        assert torch.equal(rows[:, :real], wanted)
        assert (rows[:, real:] == -1).all()
    x, base = (torch.randn((batch, tokens, 4), generator=generator) for _ in range(2))
    (y,) = run("Compact", [x, both[0]], [F32])
    (z,) = run("ScatterAdd", [y + 1, both[0], base], [F32])
    torch.testing.assert_close(z, torch.where(mask[..., None], base + x + 1, base), rtol=0, atol=1e-6)
    with pytest.raises(Exception, match="waiting for the stream"):
        run("SelectRows", [mask], [I64] * 2, padded=batch * tokens - 1)
    with pytest.raises(Exception, match=r"DecideRows: .* when waiting for the stream"):
        run("DecideRows", [differences], [I64] * 2, padded=batch * tokens - 1)


def test_padded_rows_have_no_place(run: NodeRunner) -> None:
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    rows, _ = run("SelectRows", [mask], [I64] * 2, padded=6)
    places, index = run("RaggedPlaces", [rows, torch.ones(3, 2, 4)], [I64] * 2)
    assert places.tolist() == [[[0, 0], [2, 0], [2, 1], [-1, -1], [-1, -1], [-1, -1]]]
    assert index.tolist() == [[0, 0], [0, 0], [1, 2]]


def test_the_body_of_reduced_attention_calls_the_kernel_of_ragged_places(
    run: NodeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only kernel there that waits is made to fail: the body itself has no such message."""
    rows, slots = torch.tensor([[[0, 0], [1, 1]]]), torch.arange(3).expand(2, -1)
    new, past = torch.ones(1, 2, 8), torch.ones(2, 1, 3, 8)
    inputs = [torch.ones(1, 2, 8), rows, new, new, past, past, slots, torch.zeros(2, 2, 5)]
    attributes = {"heads": 1, "kv_heads": 1, "scale": 1.0, "masked": -1e30}
    outputs = [F32, F32, F32, I64]
    assert run("ReducedAttention", inputs, outputs, **attributes)[0].tolist() == [[[1.0] * 8] * 2]
    monkeypatch.setenv("IRC_EMULATED_ERROR", "700")
    with pytest.raises(Exception, match="RaggedPlaces: an emulated error"):
        run("ReducedAttention", inputs, outputs, **attributes)
