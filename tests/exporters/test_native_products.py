"""The CPU kernels of Router and ForecastAdd: right up to rounding, in place, and with messages for wrong shapes."""

from __future__ import annotations

import pytest
import torch

from irc.bench.kernels.check import DTYPES, NodeRunner, random_case
from irc.bench.kernels.products import draw_products
from irc.runtime.native import installed_library
from passes import dialect  # noqa: F401 - registers the operators

LIBRARY = installed_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native operator library is not installed")
irc = torch.ops.irc
F32 = torch.float32
OPERATORS = ("Router", "ForecastAdd")


@pytest.fixture(scope="module")
def run() -> NodeRunner:
    assert LIBRARY is not None
    return NodeRunner(LIBRARY.path, "CPUExecutionProvider")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_random_products(run: NodeRunner, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for number in range(40):
        case = random_case(generator, number)
        if not case["batch"]:
            continue
        x = torch.randn(case["batch"], case["tokens"], case["width"], generator=generator).to(dtype)
        rows, _ = irc.select_rows(torch.rand(x.shape[:2], generator=generator) < case["share"])
        drawn = draw_products(x, rows, generator, padded=False)
        for operator in OPERATORS:
            (found,) = run(operator, drawn[operator].inputs, [drawn[operator].kind])
            assert drawn[operator].is_near(found), (operator, case)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (1, 1), (1, 4), (2, 5), (1, 700)])
@pytest.mark.parametrize(("width", "hidden"), [(40, 8), (700, 90)])
def test_routers_score_every_token(run: NodeRunner, batch: int, tokens: int, width: int, hidden: int) -> None:
    """A token of NaN has a score of NaN and executes; the other tokens are not affected."""
    x, w1, b1 = torch.randn(batch, tokens, width), torch.randn(width, hidden) / width**0.5, torch.randn(hidden)
    w2, b2 = torch.randn(hidden, 1) / hidden**0.5, torch.randn(1)
    x[-1:, -1, 3] = torch.nan
    (found,) = run("Router", [x, w1, b1, w2, b2], [F32])
    torch.testing.assert_close(found, irc.router(x, w1, b1, w2, b2), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found.isnan().sum() == min(batch, 1)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_forecasts_are_added_to_chosen_tokens_alone(run: NodeRunner, share: float) -> None:
    x, base = torch.randn(2, 450, 24), torch.randn(2, 450, 36)
    down, up, bias = torch.randn(24, 8) / 5, torch.randn(8, 36) / 3, torch.randn(36)
    chosen = torch.rand(2, 450) < share
    rows, _ = irc.select_rows(chosen)
    (z,) = run("ForecastAdd", [x, rows, base, down, up, bias], [F32])
    torch.testing.assert_close(z, irc.forecast_add(x, rows, base, down, up, bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(z[~chosen], base[~chosen])


@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize(("width", "rank", "columns"), [(1001, 120, 700), (3, 2, 70_000), (70_000, 1, 5)])
def test_weights_that_several_threads_share_give_the_sums_of_one(
    run: NodeRunner, tokens: int, width: int, rank: int, columns: int
) -> None:
    x, base = torch.randn(1, tokens, width), torch.randn(1, tokens, columns)
    down, up = torch.randn(width, rank) / width**0.5, torch.randn(rank, columns) / rank**0.5
    rows, _ = irc.select_rows(torch.ones(1, tokens, dtype=torch.bool))
    inputs = {
        "ForecastAdd": [x, rows, base, down, up, torch.randn(columns)],
        "Router": [x, down, torch.randn(rank), up[:, :1], torch.randn(1)],
    }
    assert LIBRARY is not None
    for operator, given in inputs.items():
        (found,) = run(operator, given, [F32])
        wanted = irc.forecast_add(*given) if operator == "ForecastAdd" else irc.router(*given)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        for threads in (1, 4):
            (again,) = NodeRunner(LIBRARY.path, "CPUExecutionProvider", threads)(operator, given, [F32])
            assert torch.equal(again, found)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("width", "rank"), [(0, 8), (8, 0), (0, 0)])
def test_sums_of_nothing_are_zero(run: NodeRunner, tokens: int, width: int, rank: int) -> None:
    run("ForecastAdd", [torch.ones(1, 9, 64), *_all_rows(9), torch.ones(1, 9, 64), *_linears(64, 64, 64)], [F32])
    x, base = torch.ones(1, tokens, width), torch.ones(1, tokens, 16)
    (z,) = run("ForecastAdd", [x, *_all_rows(tokens), base, *_linears(width, rank, 16)], [F32])
    assert torch.equal(z, base + 1)
    (y,) = run("Router", [x, torch.ones(width, 8), torch.ones(8), torch.ones(8, 1), torch.ones(1)], [F32])
    assert torch.equal(y, torch.full((1, tokens), 9.0 + 8 * width))


def _all_rows(tokens: int) -> list[torch.Tensor]:
    return [irc.select_rows(torch.ones(1, tokens, dtype=torch.bool))[0]]


def _linears(width: int, rank: int, columns: int) -> list[torch.Tensor]:
    return [torch.ones(width, rank), torch.ones(rank, columns), torch.ones(columns)]


token, weight, row = torch.ones(1, 1, 4), torch.ones(4, 4), torch.zeros(1, 1, 2, dtype=torch.int64)
WRONG = {
    "a router of two columns": (
        "Router",
        [token, weight, torch.ones(4), torch.ones(4, 2), torch.ones(2)],
        r"w2 \[4, 2\], b2 \[2\]",
    ),
    "another rank": (
        "ForecastAdd",
        [token, row, token, torch.ones(4, 2), torch.ones(3, 4), torch.ones(4)],
        r"down is \[4, 2\], up \[3, 4\]",
    ),
    "a base of other tokens": (
        "ForecastAdd",
        [token, row, torch.ones(1, 2, 4), weight, weight, torch.ones(4)],
        r"base \[1, 2, 4\] has other tokens",
    ),
    "a row outside": ("ForecastAdd", [token, row + 1, token, weight, weight, torch.ones(4)], r"ForecastAdd: row"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error_that_says_so(run: NodeRunner, name: str) -> None:
    operator, inputs, message = WRONG[name]
    with pytest.raises(Exception, match=message):
        run(operator, inputs, [F32])
