"""The streaming statistics and the closed form, compared with dense computations in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from irc.model.modules import Forecaster
from irc.model.routed import RoutedForCausalLM
from irc.training import closed_form as calibration
from irc.training.closed_form import UnitStatistics, gather_statistics, reduced_rank_regression, set_closed_form

WIDTH, TOKENS = 12, 400


def tokens(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return correlated inputs with a nonzero mean, and outputs that depend on them nonlinearly, [TOKENS, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator)
    x = torch.randn(TOKENS, WIDTH, generator=generator) @ mix + 0.7
    y = torch.tanh(x @ torch.randn(WIDTH, WIDTH, generator=generator) / 3) + 0.1 * x.square() - 0.4
    return x, y


def statistics_of(x: torch.Tensor, y: torch.Tensor, pieces: int = 1) -> UnitStatistics:
    statistics = UnitStatistics(WIDTH)
    for part_x, part_y in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        statistics.add(part_x, part_y)
    return statistics


def dense(x: torch.Tensor, y: torch.Tensor, rank: int, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Return slope [d, d] and bias [d] of the weighted reduced-rank ridge regression, computed from the data matrix.

    Ridge by lstsq on rows that are appended to the centred data, rank by the SVD of the fitted outputs.
    """
    x64, y64 = x.double().numpy(), y.double().numpy()
    weight = 1 / np.maximum((y64**2).sum(1), 1e-6)
    weight /= weight.sum()
    mean_x, mean_y = weight @ x64, weight @ y64
    rows = np.sqrt(weight)[:, None]
    a, b = rows * (x64 - mean_x), rows * (y64 - mean_y)
    damping = ridge * (a**2).sum() / WIDTH
    slope = np.linalg.lstsq(
        np.vstack([a, np.sqrt(damping) * np.eye(WIDTH)]), np.vstack([b, np.zeros((WIDTH, WIDTH))]), rcond=None
    )[0]
    directions = np.linalg.svd(a @ slope)[2][:rank]
    slope = slope @ directions.T @ directions
    return slope, mean_y - mean_x @ slope


@pytest.mark.parametrize("ridge", [1e-4, 0.3])
@pytest.mark.parametrize("rank", [1, 4, WIDTH])
def test_the_closed_form_is_the_dense_solution(rank: int, ridge: float) -> None:
    x, y = tokens()
    down, up, bias = reduced_rank_regression(statistics_of(x, y), rank, ridge)
    slope, intercept = dense(x, y, rank, ridge)
    assert down.shape == (rank, WIDTH)
    assert up.shape == (WIDTH, rank)
    # The products of the statistics are float32: a relative error of 1e-7 times a condition number of several hundred.
    np.testing.assert_allclose((up @ down).T.numpy(), slope, atol=2e-4 * abs(slope).max())
    np.testing.assert_allclose(bias.numpy(), intercept, atol=2e-4 * abs(intercept).max())


def test_wide_units_lose_nothing_by_subspace_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    width, rank = 160, 20
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, width, generator=generator) * torch.linspace(1, 0.2, width)
    y = torch.tanh(x @ torch.randn(width, width, generator=generator) / 9)
    statistics = UnitStatistics(width)
    statistics.add(x, y)
    exact = reduced_rank_regression(statistics, rank, 1e-4)
    monkeypatch.setattr(calibration, "_EXACT_WIDTH", 100)
    found = reduced_rank_regression(statistics, rank, 1e-4)

    def unexplained(parts: tuple[torch.Tensor, ...]) -> float:
        down, up, bias = (part.float() for part in parts)
        return float(((x @ down.T @ up.T + bias - y).square().sum(-1) / y.square().sum(-1)).mean())

    best, other = unexplained(exact), unexplained(found)
    assert other < 1.0005 * best < 0.9
    assert not torch.equal(found[1], exact[1])  # another method was used
    monkeypatch.setattr(calibration, "_ITERATIONS", 0)
    assert unexplained(reduced_rank_regression(statistics, rank, 1e-4)) > 1.01 * best  # iterating matters


def test_weighted_error_is_least_at_the_solution() -> None:
    x, y = tokens()
    down, up, bias = (part.float() for part in reduced_rank_regression(statistics_of(x, y), WIDTH, 1e-9))

    def error(slope: torch.Tensor) -> float:
        return float(((x @ slope.T + bias - y).square().sum(-1) / y.square().sum(-1)).mean())

    best = error(up @ down)
    for seed in range(5):
        nudge = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.01
        assert error(up @ down + nudge) > best


def test_streaming_in_pieces_equals_one_piece() -> None:
    x, y = tokens()
    whole, pieces = statistics_of(x, y), statistics_of(x, y, pieces=7)
    assert whole.tokens == pieces.tokens == TOKENS
    for name in ("x", "y", "xx", "xy"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-5, atol=1e-4)
    for one, other in zip(
        reduced_rank_regression(whole, WIDTH, 1e-3)[2:], reduced_rank_regression(pieces, WIDTH, 1e-3)[2:], strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_sums_over_many_tokens_are_not_rounded_to_bf16() -> None:
    x, y = (torch.randn(200, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact, cast = (UnitStatistics(8) for _ in range(2))
    exact.add(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(x, y)
    assert torch.equal(cast.xx, exact.xx)
    assert torch.equal(cast.xy, exact.xy)


def test_gathered_statistics_leave_padding_out(
    make_routed: Callable[..., RoutedForCausalLM], ids: torch.Tensor
) -> None:
    model = make_routed()
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[1, :5] = keep[3, :9] = False

    def gather(text: torch.Tensor, kept: torch.Tensor | None) -> dict[str, UnitStatistics]:
        with gather_statistics(model, kept) as statistics, model.control.using(mode="execute"), torch.no_grad():
            model(input_ids=text, attention_mask=keep.long(), use_cache=False)
        return statistics

    masked = gather(ids, keep)
    other = gather(torch.where(keep, ids, 99), keep)
    everything = gather(ids, None)
    for unit in model.units:
        assert masked[unit.name].tokens == int(keep.sum())
        assert everything[unit.name].tokens == keep.numel()
        torch.testing.assert_close(masked[unit.name].xy, other[unit.name].xy, rtol=0, atol=0)
        assert not torch.allclose(masked[unit.name].x, everything[unit.name].x)


def test_gathered_inputs_and_outputs_are_the_units(
    make_routed: Callable[..., RoutedForCausalLM], ids: torch.Tensor
) -> None:
    model = make_routed()
    unit = model.units[1]
    seen: list[torch.Tensor] = []
    router = model.part(unit, "router")
    handle = router.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with gather_statistics(model) as statistics, model.control.using(mode="execute"), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    output = model.graph.get_submodule(unit.name)(seen[0])
    y = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)
    expected = UnitStatistics(unit.width)
    expected.add(seen[0].flatten(0, 1), y)
    torch.testing.assert_close(statistics[unit.name].xy, expected.xy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(statistics[unit.name].y, expected.y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [3, WIDTH])
def test_silu_starts_close_to_the_linear_solution(rank: int) -> None:
    x, y = tokens()
    statistics = statistics_of(x, y)
    linear, silu = Forecaster(WIDTH, rank), Forecaster(WIDTH, rank, "silu")
    set_closed_form(linear, statistics, rank, 1e-4)
    set_closed_form(silu, statistics, rank, 1e-4)
    with torch.no_grad():
        wanted, found = linear(x), silu(x)
    # silu(h + 6) differs from h + 6 by at most a few percent of the range of h, about +-4.
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    assert float((found - wanted).norm() / wanted.norm()) > 0  # it is not linear
