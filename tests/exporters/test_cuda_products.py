"""The CUDA kernels of products, thread by thread on the host, as in test_cuda_emulated.py."""

from __future__ import annotations

import pytest
import torch

from irc.bench.kernels.check import NodeRunner

irc = torch.ops.irc
F32 = torch.float32
NONE = [-1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("real", [0, 1, 3, 6, 8])
@pytest.mark.parametrize(("depth", "columns"), [(40, 64), (700, 36), (1200, 13), (512, 264)])
def test_few_rows_are_summed_and_the_others_are_zeros(
    run: NodeRunner, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, real: int, depth: int, columns: int
) -> None:
    """With any values in x and w for padding rows, and with every wait an error."""
    monkeypatch.setenv("IRC_EMULATED_ERROR", "700")
    x, w = torch.randn(1, 8, depth), torch.randn(depth, columns) / depth**0.5
    x[:, real:] = torch.nan
    rows = torch.tensor([[[row, 0] if row < real else NONE for row in range(8)]])
    (y,) = run("RoutedMatMul", [x.to(dtype), rows, w.to(dtype)], [dtype])
    expected = (x.to(dtype).float() @ w.to(dtype).float()).to(dtype)
    rtol, atol = {F32: (1e-5, 1e-5), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)}[dtype]
    torch.testing.assert_close(y[:, :real], expected[:, :real], rtol=rtol, atol=atol)
    assert (y[:, real:] == 0).all()


def test_weights_are_not_read_where_no_row_is_a_tokens(run: NodeRunner) -> None:
    w = torch.full((600, 16), torch.nan)
    (y,) = run("RoutedMatMul", [torch.ones(1, 2, 600), torch.tensor([[NONE, NONE]]), w], [F32])
    assert (y == 0).all()


@pytest.mark.parametrize("count", [9, 30])
def test_many_rows_go_to_cublas(run: NodeRunner, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The product is not square, so that swapped sizes would show; the place of cuBLAS's handle is right."""
    x, w = torch.randn(1, count, 24), torch.randn(24, 10)
    rows = torch.stack((torch.zeros(count, dtype=torch.int64), torch.arange(count)), 1).unsqueeze(0)
    (y,) = run("RoutedMatMul", [x, rows, w], [F32])
    torch.testing.assert_close(y, x @ w, rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("IRC_EMULATED_HANDLE", "1")
    with pytest.raises(Exception, match="RoutedMatMul: Failed to fetch a stream hosting the requested resource"):
        run("RoutedMatMul", [x, rows, w], [F32])


@pytest.mark.parametrize("real", [0, 2, 5, 20])
@pytest.mark.parametrize(("width", "rank", "out"), [(40, 4, 40), (1300, 100, 24), (16, 600, 9)])
def test_a_forecast_is_added_to_its_tokens(
    run: NodeRunner, monkeypatch: pytest.MonkeyPatch, real: int, width: int, rank: int, out: int
) -> None:
    monkeypatch.setenv("IRC_EMULATED_ERROR", "700")
    x, base = torch.randn(4, 6, width), torch.randn(4, 6, out)
    down, up, bias = torch.randn(width, rank) / width**0.5, torch.randn(rank, out) / rank**0.5, torch.randn(out)
    rows = torch.randperm(24)[:real].sort().values
    pairs = torch.stack((rows // 6, rows % 6), 1).unsqueeze(0)
    expected = irc.forecast_add(x, pairs, base, down, up, bias)
    given = torch.cat((pairs, torch.tensor([[NONE, NONE]])), 1)
    (z,) = run("ForecastAdd", [x, given, base, down, up, bias], [F32])
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("real", [0, 1, 7, 12])
@pytest.mark.parametrize(("depth", "columns"), [(24, 16), (1200, 72), (600, 5)])
def test_a_gate_is_two_products(
    run: NodeRunner, monkeypatch: pytest.MonkeyPatch, real: int, depth: int, columns: int
) -> None:
    monkeypatch.setenv("IRC_EMULATED_ERROR", "700")
    x, gate, up = torch.randn(1, real + 1, depth), torch.randn(depth, columns), torch.randn(depth, columns)
    x[:, real:] = 0
    rows = torch.tensor([[*([0, row] for row in range(real)), NONE]])
    gate /= depth**0.5
    (y,) = run("RoutedGate", [x, rows, gate, up], [F32])
    torch.testing.assert_close(y, irc.routed_gate(x, rows, gate, up), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 4), (3, 20)])
@pytest.mark.parametrize(("width", "hidden"), [(40, 8), (1300, 300)])
def test_routers_score_every_token(
    run: NodeRunner, monkeypatch: pytest.MonkeyPatch, batch: int, tokens: int, width: int, hidden: int
) -> None:
    """A token of NaN has a score of NaN and executes; the other tokens are not affected."""
    monkeypatch.setenv("IRC_EMULATED_ERROR", "700")
    x, w1, b1 = torch.randn(batch, tokens, width), torch.randn(width, hidden) / width**0.5, torch.randn(hidden)
    w2, b2 = torch.randn(hidden, 1) / hidden**0.5, torch.randn(1)
    x[-1, -1, 3] = torch.nan
    (found,) = run("Router", [x, w1, b1, w2, b2], [F32])
    torch.testing.assert_close(found, irc.router(x, w1, b1, w2, b2), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found.isnan().sum() == 1


row, token, weight = torch.tensor([[NONE]]), torch.ones(1, 1, 4), torch.ones(4, 4)
WRONG: dict[str, tuple[str, list[torch.Tensor], str]] = {
    "another depth": ("RoutedMatMul", [token, row, torch.ones(5, 3)], r"expected \[1, 1, 5\]"),
    "another number of rows": (
        "RoutedMatMul",
        [torch.ones(1, 2, 4), row, weight],
        r"is \[1, 2, 4\], expected \[1, 1, 4\]",
    ),
    "another rank": (
        "ForecastAdd",
        [token, row, token, torch.ones(4, 2), torch.ones(3, 4), torch.ones(4)],
        r"down is \[4, 2\], up \[3, 4\]",
    ),
    "two widths": ("RoutedGate", [token, row, weight, torch.ones(4, 3)], r"gate is \[4, 4\], up \[4, 3\]"),
    "a router of two columns": (
        "Router",
        [token, weight, torch.ones(4), torch.ones(4, 2), torch.ones(2)],
        r"w2 \[4, 2\], b2 \[2\], expected \[4, hidden\], \[hidden\], \[hidden, 1\], \[1\]",
    ),
    "a base of other tokens": (
        "ForecastAdd",
        [token, row, torch.ones(1, 2, 4), weight, weight, torch.ones(4)],
        r"base \[1, 2, 4\] has other tokens",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error_that_says_so(run: NodeRunner, name: str) -> None:
    op, inputs, message = WRONG[name]
    with pytest.raises(Exception, match=message):
        run(op, inputs, [F32])
