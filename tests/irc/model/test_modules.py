from __future__ import annotations

import pytest
import torch

from irc.model.modules import (
    APPROXIMATE,
    EXECUTE,
    Forecaster,
    Mux,
    Record,
    Router,
    RoutingControl,
    StoredKeys,
    StraightThroughMux,
    ZeroForecaster,
    forecast_error,
    router_hidden,
)
from irc.recipe.recipe import default_rank

BATCH, TOKENS, WIDTH = 2, 5, 6


def _tensors(dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, forecast [batch, tokens, d] and logits [batch, tokens, 2]."""
    shapes = ((BATCH, TOKENS, WIDTH), (BATCH, TOKENS, WIDTH), (BATCH, TOKENS, 2))
    y, forecast, logits = (torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes)
    return y, forecast, logits


@pytest.mark.parametrize(("width", "rank"), [(5, 1), (9, 1), (64, 6), (999, 99), (3072, 100), (4096, 100), (8192, 100)])
def test_default_rank(width: int, rank: int) -> None:
    assert default_rank(width) == rank


@pytest.mark.parametrize(
    ("width", "rank", "hidden"),
    [(4096, 100, 824), (3072, 100, 568), (64, 6, 8), (256, 25, 14), (256, 32, 8), (8, 1, 8)],
)
def test_router_hidden(width: int, rank: int, hidden: int) -> None:
    assert router_hidden(width, rank) == hidden


def test_router_maps_a_hidden_state_to_two_logits() -> None:
    router = Router(WIDTH, 8)
    assert router(torch.randn(BATCH, TOKENS, WIDTH)).shape == (BATCH, TOKENS, 2)
    assert sum(parameter.numel() for parameter in router.parameters()) == WIDTH * 8 + 8 + 8 * 2 + 2


def test_router_shift_moves_the_execute_logit_alone() -> None:
    router, x = Router(WIDTH, 8), torch.randn(BATCH, TOKENS, WIDTH)
    before = router(x)
    router.shift(3.0)
    # fp32: one addition of 3 to values near 1 rounds by at most 2.4e-7.
    torch.testing.assert_close(router(x)[..., EXECUTE], before[..., EXECUTE] + 3.0, rtol=0, atol=5e-7)
    torch.testing.assert_close(router(x)[..., APPROXIMATE], before[..., APPROXIMATE], rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["linear", "silu"])
def test_forecaster_is_low_rank(activation: str) -> None:
    forecaster, x = Forecaster(WIDTH, 2, activation), torch.randn(BATCH, TOKENS, WIDTH)
    hidden = x @ forecaster.down.weight.T + forecaster.down.bias
    if activation == "silu":
        hidden = hidden * torch.sigmoid(hidden)
    expected = hidden @ forecaster.up.weight.T + forecaster.up.bias
    # fp32: sums of at most six products.
    torch.testing.assert_close(forecaster(x), expected, rtol=1e-5, atol=1e-6)
    outputs = (forecaster(torch.randn(50, WIDTH)) - forecaster.up.bias).detach()
    assert torch.linalg.matrix_rank(outputs) == 2


def test_zero_forecaster() -> None:
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(ZeroForecaster()(x), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_follows_the_larger_logit_and_executes_on_a_tie(dtype: torch.dtype) -> None:
    y, forecast, logits = _tensors(dtype)
    logits[0, 0] = torch.tensor([0.25, 0.25])
    out = Mux("u", RoutingControl())(y, forecast, logits)
    for row in range(BATCH):
        for token in range(TOKENS):
            execute = logits[row, token].argmax().item() == EXECUTE
            assert torch.equal(out[row, token], (y if execute else forecast)[row, token])
    assert torch.equal(out[0, 0], y[0, 0])
    assert {True, False} == set((logits.argmax(-1) == EXECUTE).flatten().tolist())


@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.parametrize("mode", ["execute", "approximate"])
def test_modes_that_ignore_routers(mode: str, with_logits: bool) -> None:
    y, forecast, logits = _tensors()
    control = RoutingControl(mode=mode, tape={})  # type: ignore[arg-type]
    out = Mux("u", control)(y, forecast, logits if with_logits else None)
    assert torch.equal(out, y if mode == "execute" else forecast)
    assert control.tape is not None
    assert control.tape["u"].execute.all() if mode == "execute" else not control.tape["u"].execute.any()


@pytest.mark.parametrize("mode", ["route", "sample"])
def test_without_a_router_every_token_executes(mode: str) -> None:
    y, forecast, _ = _tensors()
    assert torch.equal(Mux("u", RoutingControl(mode=mode))(y, forecast), y)  # type: ignore[arg-type]


def test_forced_masks_are_per_unit() -> None:
    y, forecast, logits = _tensors()
    mask = torch.rand(BATCH, TOKENS) < 0.5
    control = RoutingControl(mode="forced", masks={"a": mask, "b": ~mask})
    out_a, out_b = Mux("a", control)(y, forecast, logits), Mux("b", control)(y, forecast, logits)
    assert torch.equal(out_a[mask], y[mask])
    assert torch.equal(out_a[~mask], forecast[~mask])
    assert torch.equal(out_a + out_b, y + forecast)


def test_forecast_takes_the_dtype_of_the_unit() -> None:
    y, _, logits = _tensors(torch.bfloat16)
    forecast = torch.randn(BATCH, TOKENS, WIDTH)
    for mode in ("route", "sample", "approximate"):
        control = RoutingControl(mode=mode, noise={"u": torch.rand(BATCH, TOKENS)})  # type: ignore[arg-type]
        assert Mux("u", control)(y, forecast, logits).dtype == torch.bfloat16


def test_sampling_is_the_same_for_the_same_noise_and_another_for_other_noise() -> None:
    y, forecast, logits = _tensors()
    logits = logits * 0.1
    noise = torch.rand(BATCH, TOKENS)
    outs = []
    for draws in (noise, noise.clone(), 1 - noise):
        control = RoutingControl(mode="sample", noise={"u": draws})
        outs.append(Mux("u", control)(y, forecast, logits))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_sampling_executes_as_often_as_the_logits_say() -> None:
    """Gumbel noise: P(execute) = sigmoid(difference), whatever the temperature."""
    count = 40_000
    logits = torch.tensor([1.0, 0.0]).expand(1, count, 2)
    y, forecast = torch.ones(1, count, 1), torch.zeros(1, count, 1)
    for temperature in (0.5, 2.0):
        control = RoutingControl(mode="sample", temperature=temperature, noise={"u": torch.rand(1, count)})
        share = Mux("u", control)(y, forecast, logits).mean().item()
        # Four standard deviations of a mean of 40,000 draws.
        assert abs(share - torch.sigmoid(torch.tensor(1.0)).item()) < 4 * (0.25 / count) ** 0.5


def test_extreme_noise_stays_finite() -> None:
    y, forecast, logits = _tensors(grad=True)
    noise = torch.zeros(BATCH, TOKENS)
    noise[0] = 1.0
    control = RoutingControl(mode="sample", noise={"u": noise})
    Mux("u", control)(y, forecast, logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_straight_through_forward_copies_exactly() -> None:
    y, forecast, _ = _tensors()
    soft = torch.rand(BATCH, TOKENS)
    out = StraightThroughMux.apply(y, forecast, soft >= 0.5, soft)
    assert torch.equal(out, torch.where((soft >= 0.5).unsqueeze(-1), y, forecast))


def test_straight_through_gradient_is_the_analytic_one() -> None:
    """Equals autograd through gate * y + (1 - gate) * forecast with gate = hard + soft - soft.detach().

    The branches' gradients are copies (exact); the gate's is a sum of d products (fp32: 1e-6).
    """
    y, forecast, _ = _tensors(grad=True)
    soft = torch.rand(BATCH, TOKENS, requires_grad=True)
    execute = soft.detach() >= 0.5
    weights = torch.randn(BATCH, TOKENS, WIDTH)
    got = torch.autograd.grad(
        (StraightThroughMux.apply(y, forecast, execute, soft) * weights).sum(), [y, forecast, soft]
    )
    gate = (execute.float() + soft - soft.detach()).unsqueeze(-1)
    out = gate * y + (1 - gate) * forecast
    expected = torch.autograd.grad((out * weights).sum(), [y, forecast, soft])
    hard = execute.unsqueeze(-1).float()
    torch.testing.assert_close(got[0], hard * weights, rtol=0, atol=0)
    torch.testing.assert_close(got[1], (1 - hard) * weights, rtol=0, atol=0)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6)
    assert got[2].abs().min() > 0


def test_straight_through_asks_only_for_what_is_needed() -> None:
    y, forecast, _ = _tensors()
    soft = torch.rand(BATCH, TOKENS, requires_grad=True)
    StraightThroughMux.apply(y, forecast, soft.detach() >= 0.5, soft).sum().backward()
    torch.testing.assert_close(soft.grad, (y - forecast).sum(-1), rtol=1e-6, atol=1e-6)
    assert y.grad is None
    assert forecast.grad is None


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sampling_gradient_reaches_the_router(temperature: float) -> None:
    """d soft / d difference = soft * (1 - soft) / temperature; the two logits get opposite gradients."""
    y, forecast, logits = _tensors(grad=True)
    noise = torch.rand(BATCH, TOKENS) * 0.8 + 0.1
    control = RoutingControl(mode="sample", temperature=temperature, noise={"u": noise}, tape={})
    Mux("u", control)(y, forecast, logits).sum().backward()
    difference = (logits[..., EXECUTE] - logits[..., APPROXIMATE]).detach()
    soft = torch.sigmoid((difference + noise.log() - (1 - noise).log()) / temperature)
    expected = (y - forecast).detach().sum(-1) * soft * (1 - soft) / temperature
    assert logits.grad is not None
    # fp32: a sum of six terms and a sigmoid.
    torch.testing.assert_close(logits.grad[..., EXECUTE], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.grad[..., APPROXIMATE], -logits.grad[..., EXECUTE], rtol=0, atol=0)
    assert control.tape is not None
    soft_seen = control.tape["u"].soft
    assert soft_seen is not None
    torch.testing.assert_close(soft_seen, soft, rtol=1e-5, atol=1e-6)
    assert torch.equal(control.tape["u"].execute, soft_seen >= 0.5)


def test_record_of_routing() -> None:
    y, forecast, logits = _tensors(torch.bfloat16)
    control = RoutingControl(tape={})
    Mux("u", control)(y, forecast, logits)
    assert control.tape is not None
    record = control.tape["u"]
    assert isinstance(record, Record)
    assert record.execute.dtype == torch.bool
    assert record.execute.shape == (BATCH, TOKENS)
    assert record.difference is not None
    assert record.difference.dtype == torch.float32
    assert torch.equal(record.difference, logits[..., EXECUTE].float() - logits[..., APPROXIMATE].float())
    assert torch.equal(record.execute, record.difference >= 0)
    assert (record.soft, record.l1, record.cosine) == (None, None, None)


def test_record_measures_the_forecast_when_asked() -> None:
    y, forecast, _ = _tensors()
    control = RoutingControl(tape={}, measure_error=True)
    Mux("u", control)(y, forecast)
    assert control.tape is not None
    record = control.tape["u"]
    assert record.difference is None
    assert record.l1 is not None
    assert record.cosine is not None
    # fp32: means and dot products of six values.
    torch.testing.assert_close(record.l1, (forecast - y).abs().sum(-1) / WIDTH, rtol=1e-5, atol=1e-6)
    dot = (forecast * y).sum(-1) / (forecast.norm(dim=-1) * y.norm(dim=-1))
    torch.testing.assert_close(record.cosine, dot, rtol=1e-5, atol=1e-6)


def test_no_tape_no_record() -> None:
    control = RoutingControl()
    Mux("u", control)(*_tensors())
    assert control.tape is None


def test_forecast_error_of_a_perfect_and_of_an_opposite_forecast() -> None:
    y, *_ = _tensors(torch.bfloat16)
    error, cosine = forecast_error(y, y)
    assert error.dtype == torch.float32
    assert error.abs().max() == 0
    # fp32: a cosine of a vector with itself rounds by a few units in the last place.
    torch.testing.assert_close(cosine, torch.ones(BATCH, TOKENS), rtol=0, atol=1e-6)
    torch.testing.assert_close(forecast_error(-y, y)[1], -torch.ones(BATCH, TOKENS), rtol=0, atol=1e-6)


def test_control_returns_to_what_it_was_also_after_a_failure() -> None:
    control = RoutingControl(temperature=3.0)
    with control.using(mode="execute", temperature=1.0) as inside:
        assert inside is control
        assert (control.mode, control.temperature) == ("execute", 1.0)
    assert (control.mode, control.temperature) == ("route", 3.0)
    with pytest.raises(ZeroDivisionError), control.using(mode="sample"):
        raise ZeroDivisionError
    assert control.mode == "route"
    with pytest.raises(AttributeError), control.using(temperatur=1.0):
        pass


def test_stored_are_past_keys_that_are_not_zero_and_executed_tokens() -> None:
    past = torch.zeros(2, 2, 3, 4)
    past[0, 1, 0, 3] = past[1, 0, 2, 0] = -1e-3  # one number of one head is enough
    control = RoutingControl(mode="forced", reduced=frozenset({"attention"}))
    control.masks["attention"] = torch.tensor([[True, False], [False, True]])
    mask = torch.ones(2, 1, 2, 5, dtype=torch.bool).tril(3)
    seen, stored = StoredKeys("attention", control)(mask, past, torch.zeros(2, 2, 2))
    assert stored.tolist() == [[True, False, False, True, False], [False, False, True, False, True]]
    assert torch.equal(seen, mask & stored[:, None, None])
    assert StoredKeys("another unit", control)(mask, past, torch.zeros(2, 2, 2))[1].all()
