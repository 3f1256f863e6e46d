"""CPU kernels that move rows equal the eager dialect on random shapes, and refuse wrong shapes with a message."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irc.bench.kernels.check import DTYPES, NodeRunner
from irc.runtime.native import installed_library
from passes import dialect  # noqa: F401 - registers the operators

LIBRARY = installed_library()
irc = torch.ops.irc


@pytest.fixture(scope="module")
def run() -> NodeRunner:
    if LIBRARY is None:
        pytest.skip("the native operator library is not installed")
    return NodeRunner(LIBRARY.path, "CPUExecutionProvider")


def test_the_library_is_installed_where_there_is_a_compiler() -> None:
    assert LIBRARY is not None or shutil.which(os.environ.get("CXX", "c++")) is None, "make native builds it"


cases = st.fixed_dictionaries(
    {
        "batch": st.integers(0, 3),
        "tokens": st.integers(0, 300),
        "width": st.sampled_from([1, 3, 16, 100, 257]),
        "share": st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
        "dtype": st.sampled_from(list(DTYPES.values())),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases)
def test_rows_are_moved_exactly(run: NodeRunner, case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    shape, dtype = (case["batch"], case["tokens"], case["width"]), case["dtype"]
    mask = torch.rand(shape[:2], generator=generator) < case["share"]
    x, base = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    executed, skipped = run("SelectRows", [mask], [torch.int64] * 2)
    drawn = torch.randint(0, 4, shape[:2], generator=generator)
    difference = torch.where(mask, torch.tensor([torch.nan, 0.0, -0.0, 1.0])[drawn], -(drawn + 1.0))
    decided = run("DecideRows", [difference], [torch.int64] * 2)
    for found, same, expected in zip((executed, skipped), decided, irc.select_rows(mask), strict=True):
        assert torch.equal(found, expected)
        assert torch.equal(same, expected)
    (y,) = run("Compact", [x, executed], [dtype])
    assert torch.equal(y, irc.compact(x, executed))
    (z,) = run("Scatter", [y, executed, base], [dtype])
    assert torch.equal(z, irc.scatter(y, executed, base))
    (z,) = run("ScatterAdd", [y, executed, base], [dtype])
    assert torch.equal(z, irc.scatter_add(y, executed, base)), "one rounding, as in PyTorch"


def test_every_byte_but_zero_is_true(run: NodeRunner) -> None:
    mask = torch.tensor([[2, 0, 255, 1]], dtype=torch.uint8).view(torch.bool)
    executed, skipped = run("SelectRows", [mask], [torch.int64] * 2)
    assert executed.tolist() == [[[0, 0], [0, 2], [0, 3]]]
    assert skipped.tolist() == [[[0, 1]]]


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


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error_that_says_so(run: NodeRunner, name: str) -> None:
    op, inputs, message = WRONG[name]
    outputs = [torch.int64] * 2 if op in ("SelectRows", "DecideRows") else [torch.float32]
    with pytest.raises(Exception, match=message):
        run(op, inputs, outputs)


def test_sixteen_bit_numbers_round_as_in_pytorch(run: NodeRunner) -> None:
    """All 65,536 fp16 and bf16 numbers through a sum with zero and with a neighbour."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype).reshape(1, 1, -1)
        for base in (torch.zeros_like(x), x.roll(1)):
            (found,) = run("ScatterAdd", [x, _rows((0, 0)), base], [dtype])
            expected = base + x
            same = (found == expected) | (found.isnan() & expected.isnan())
            assert same.all(), (dtype, x[~same][:5], base[~same][:5], found[~same][:5], expected[~same][:5])
