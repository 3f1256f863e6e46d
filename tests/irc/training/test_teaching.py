"""Teaching: routers predict what a forecast costs, to second order, and start at the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from irc.conversion.pipeline import resolve
from irc.errors import IrcError
from irc.model import head
from irc.model.modules import difference_of
from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import Recipe
from irc.recipe.stages import RouterRecipe
from irc.training import stages
from irc.training.budget import Budget, plain_budget
from irc.training.loop import train
from irc.training.objectives import RoutingObjective
from irc.training.stages import StageContext, run_lff, run_router
from irc.training.teaching import _costs, _gradients, _probing, expected_cost, teach_routers


def _budget(model: RoutedForCausalLM, sparsity: float) -> Budget:
    return plain_budget([unit.name for unit in model.units], sparsity)


def test_the_cost_is_the_first_order_change_of_the_loss(
    make_routed: Callable[..., RoutedForCausalLM], shake: Any, ids: torch.Tensor
) -> None:
    """Adding a thousandth of a unit's forecast error to its output changes the loss by a thousandth of g . error."""
    model = shake(make_routed())
    model.graph.double()  # the graph was captured in float32 and has no casts

    def loss_of(step: float, unit: int) -> float:
        with torch.no_grad(), _probing(model) as seen, model.control.using(mode="execute"):
            handle = model.part(model.units[unit], "mux").register_forward_hook(
                lambda _, arguments, output: output + step * (arguments[1] - arguments[0])
            )
            logits = model(input_ids=ids, use_cache=False).logits
            handle.remove()
        assert len(seen) == len(model.units)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()

    with _probing(model) as seen, model.control.using(mode="execute"):
        logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, [probe.zero for probe in seen])
    for unit in range(len(model.units)):
        first = (gradients[unit] * seen[unit].forecast_error).sum().item()
        measured = (loss_of(1e-3, unit) - loss_of(-1e-3, unit)) / 2e-3
        assert measured == pytest.approx(first, rel=1e-3, abs=0.01)  # norms are computed in float32


def test_teaching_sets_routers_alone_and_predicts_the_cost(
    make_context: Callable[..., StageContext], bars: Any
) -> None:
    context = make_context(sparsity=0.4)
    run_lff(context)
    model = context.model
    routers = model.adapter_parameters("router")
    before = {name: p.clone() for name, p in model.graph.named_parameters() if name not in routers}
    *batches, unseen = context.train_windows()[:704].split(64)
    with bars()("teach", 10) as bar:
        teach_routers(model, batches, _budget(model, 0.4), 0, bar)
    assert all(torch.equal(p, before[name]) for name, p in model.graph.named_parameters() if name in before)
    assert not any(model.part(unit, "router")._forward_pre_hooks for unit in model.units)
    costs, read = _costs(model, unseen, 5)
    logits = torch.stack([difference_of(model.part(u, "router")(x)) for u, x in zip(model.units, read, strict=True)])
    expected = torch.cat([_costs(model, batch, 7)[0] for batch in batches], dim=1).exp().mean(1)

    def paid(order: torch.Tensor) -> float:
        return costs.exp()[order < order.quantile(0.4)].sum().item()

    assert paid(logits) < 0.85 * paid(expected[:, None] + 1e-9 * torch.rand(costs.shape)), "units alone do as well"


def _costs_of(x: torch.Tensor, weight: torch.Tensor, bias: float) -> torch.Tensor:
    """Draw logarithms of costs whose expectation is exp(weight . x + bias): squares, mostly small and rarely large."""
    squares = torch.randn(len(x), generator=torch.Generator().manual_seed(2), dtype=torch.float64).square()
    return squares.log() + x @ weight + bias


def test_the_expected_cost_is_found_among_noise_with_long_tails() -> None:
    """Regression of the logarithms would be too low by 1.27, the mean logarithm of a square."""
    x = torch.randn(40_000, 6, generator=torch.Generator().manual_seed(1)).double() + 2
    weight = torch.tensor([1.0, -0.5, 0.25, 0.0, 0.0, 2.0]).double()
    found, bias = expected_cost(x, _costs_of(x, weight, -3.0))
    # The ridge of 0.3 of the variance shrinks weights by about 0.3 / 1.3.
    assert found.tolist() == pytest.approx((weight / 1.3).tolist(), abs=0.15)
    left = _costs_of(x, weight, -3.0) - x @ found - bias
    assert left.exp().mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("largest", "distance"), [(0.0, 1e-4), (12.0, 5e-3)])
def test_the_expected_cost_minimizes_deviance_and_ridge(largest: float, distance: float) -> None:
    """The optimum is the one that PyTorch's L-BFGS finds, and nearly so if one cost dwarfs all others."""
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1)).double()
    x *= torch.tensor([1.0, 5.0, 1.0, 0.1, 1.0, 1.0])
    logarithms = _costs_of(x, torch.full((6,), 0.3).double(), 0.0)
    logarithms[7] += largest
    centred = x - x.mean(0)
    ridge = 0.3 * centred.square().mean()
    solution = torch.zeros(7, dtype=torch.float64, requires_grad=True)

    def objective(solution: torch.Tensor) -> torch.Tensor:
        left = logarithms - centred @ solution[:6] - solution[6]
        return (left.exp() - left - 1).mean() + ridge / 2 * solution[:6].square().sum()

    optimizer = torch.optim.LBFGS([solution], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = objective(solution)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    weight, bias = expected_cost(x, logarithms)
    found = objective(torch.cat([weight, torch.tensor([bias]).double() + x.mean(0) @ weight]))
    assert found.item() == pytest.approx(objective(solution).item(), abs=distance)


def test_costs_of_equal_inputs_are_their_mean() -> None:
    """Nothing to learn from: no weight, and no division by the variance of nothing."""
    logarithms = torch.tensor([0.0, 1.0, 2.0, 3.0]).double()
    weight, bias = expected_cost(torch.ones(4, 3).double(), logarithms)
    assert weight.tolist() == [0, 0, 0]
    assert bias == pytest.approx(logarithms.exp().mean().log().item())


def test_what_saves_more_is_skipped_sooner(
    make_routed: Callable[..., RoutedForCausalLM], shake: Any, bars: Any
) -> None:
    """A unit whose weight in the budget grows by a factor has logit differences that fall by its logarithm."""
    batches = torch.randint(0, 256, (16, 24), generator=torch.Generator().manual_seed(1)).split(4)
    means = []
    for factor in (1.0, 4.0):
        model = shake(make_routed())
        first = model.units[0]
        weights = {unit.name: 1.0 for unit in model.units} | {first.name: factor}
        costs = torch.cat([_costs(model, batch, index)[0] for index, batch in enumerate(batches)], dim=1)
        deviation = (costs - torch.tensor([*weights.values()]).double().log()[:, None]).std(correction=0)
        with bars()("teach", 4) as bar:
            teach_routers(model, batches, Budget(0.5, weights), 0, bar, sampled=True)
        read = torch.cat([_costs(model, batch, 0)[1][0] for batch in batches])
        means.append(difference_of(model.part(first, "router")(read)).mean().item() * deviation.item())
        overall = (costs - torch.tensor([*weights.values()]).double().log()[:, None]).mean().item()
        means[-1] += overall
    assert means[0] - means[1] == pytest.approx(math.log(4), abs=0.05)


@pytest.mark.parametrize("unit", [0, -1])
def test_costs_are_those_of_all_later_predictions(
    make_routed: Callable[..., RoutedForCausalLM],
    shake: Any,
    ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    unit: int,
) -> None:
    """The mean square of many draws is twice the KL of a small step towards the forecast, over the step's square."""
    monkeypatch.setitem(head.LOGITS_AT_ONCE, "cpu", 257 * 10)  # several parts
    model = shake(make_routed())
    ids, step = ids[:, :8], 0.03
    squares = torch.stack([_costs(model, ids, seed)[0][unit].exp() for seed in range(60)]).mean(0).view(len(ids), -1)

    @torch.no_grad()
    def predictions() -> torch.Tensor:
        with model.control.using(mode="execute"):
            return model.logits(model.states(ids))[:, :-1].double().log_softmax(-1)

    dense, mux, every = predictions(), model.part(model.units[unit], "mux"), 0.0
    for token in range(ids.shape[1] - 1):
        at = F.one_hot(torch.tensor(token), ids.shape[1])[:, None] * step

        def change(_: Any, arguments: Any, output: torch.Tensor, at: torch.Tensor = at) -> torch.Tensor:
            return output + at * (arguments[1] - arguments[0])

        handle = mux.register_forward_hook(change)
        divergence = (dense.exp() * (dense - predictions())).sum((-1, -2))
        handle.remove()
        wanted = 2 * divergence.sum().item() / step**2
        every += wanted
        assert squares[:, token].sum().item() == pytest.approx(wanted, rel=0.35), token
    assert squares.sum().item() == pytest.approx(every, rel=0.1)


def test_draws_and_tokens_have_their_own_signs(
    make_routed: Callable[..., RoutedForCausalLM], shake: Any, ids: torch.Tensor
) -> None:
    model = shake(make_routed())
    with torch.no_grad(), model.control.using(mode="execute"):
        states = model.states(ids)[0, :1].repeat(4, 1)
    first, second = _gradients(model, states, 3)
    assert len({tuple(row.tolist()) for row in (*first, *second)}) == 8
    assert torch.equal(_gradients(model, states, 3)[1], second)


def test_gradients_that_are_not_finite_are_refused(
    make_routed: Callable[..., RoutedForCausalLM], shake: Any, ids: torch.Tensor, bars: Any
) -> None:
    model = shake(make_routed())
    forecaster = model.part(model.units[1], "forecaster")
    with torch.no_grad():
        next(forecaster.parameters()).fill_(torch.inf)
    with bars()("teach", 1) as bar, pytest.raises(IrcError, match=f"{model.units[1].name} are not finite"):
        teach_routers(model, [ids], _budget(model, 0.3), 0, bar)


@pytest.mark.parametrize(("limit", "windows"), [(16_384, 12), (80, 5), (10, 1)])
def test_no_more_text_teaches_than_said(
    make_context: Callable[..., StageContext], monkeypatch: pytest.MonkeyPatch, limit: int, windows: int
) -> None:
    context = make_context()
    router = context.recipe.router
    router.steps, router.teach_steps, router.batch_size = 0, 3, 4
    monkeypatch.setattr(RouterRecipe, "most_taught", limit)
    read: list[int] = []

    def note(model: Any, batches: Sequence[torch.Tensor], *rest: Any) -> None:
        read.extend(map(len, batches))
        teach_routers(model, batches, *rest)

    monkeypatch.setattr(stages, "teach_routers", note)
    run_router(context)
    assert context.recipe.train_window == 16
    assert sum(read) == windows
    assert max(read) <= 4


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("target", [0.25, 0.7])
def test_routes_of_taught_routers_begin_near_the_target(
    make_context: Callable[..., StageContext], monkeypatch: pytest.MonkeyPatch, target: float, noise: float
) -> None:
    context = make_context(sparsity=target)
    context.recipe.router.noise = noise
    run_lff(context)
    context.recipe.router.teach_steps = 60
    begun: list[float] = []

    def note(objective: Any, *rest: Any) -> Any:
        if isinstance(objective, RoutingObjective):
            with torch.no_grad():
                begun.append(objective(context.train_windows()[:64], 0)[1]["sparsity"])
        return train(objective, *rest)

    monkeypatch.setattr(stages, "train", note)
    run_router(context)
    assert begun == [pytest.approx(target, abs=0.06)]
    bars: Any = context.progress
    assert bars.names()[-3:] == ["teach", "router", "threshold"]


def test_a_killed_stage_counts_the_seconds_of_its_teaching(
    make_context: Callable[..., StageContext], bars: Any, killed: type[BaseException], tmp_path: Path
) -> None:
    def context(made: Any) -> StageContext:
        context = make_context(made)
        context.work, context.recipe.checkpoint_seconds = tmp_path, 0.0
        context.recipe.router.teach_steps, context.recipe.router.steps = 8, 8
        return context

    whole = run_router(context(bars()))
    assert whole["earlier_seconds"] == (0.0, 0.0)
    (tmp_path / "router.checkpoint.safetensors").unlink()
    with pytest.raises(killed):
        run_router(context(bars(("router", 4))))
    seconds, cpu = run_router(context(bars()))["earlier_seconds"]
    assert seconds > 0.3 * whole["teach_seconds"]
    assert cpu > 0


def test_a_stage_without_steps_leaves_routers_as_they_were_taught(make_context: Callable[..., StageContext]) -> None:
    context = make_context()
    context.recipe.router.steps, context.recipe.router.teach_steps = 0, 4
    run_lff(context)
    figures = run_router(context)
    assert figures["calibration_sparsity"] == pytest.approx(0.25, abs=0.02)
    assert "train_seconds" not in figures
    bars: Any = context.progress
    assert bars.names()[-2:] == ["teach", "threshold"]


@pytest.mark.parametrize(
    ("policy", "sparsity", "asked", "steps"),
    [
        ("informed", 0.25, -1, 16),
        ("informed", 0.5, -1, 16),
        ("informed", 0.7, -1, 0),
        ("informed", 0.7, 5, 5),
        ("informed", 0.25, 0, 0),
        ("skipgpt", 0.25, -1, 0),
        ("skipgpt", 0.25, 5, 5),
        ("static", 0.25, 5, 0),
    ],
)
def test_who_is_taught(policy: str, sparsity: float, asked: int, steps: int) -> None:
    recipe = Recipe(policy=policy, sparsity=sparsity, device="cpu")
    recipe.router.teach_steps = asked
    assert resolve(recipe).router.teach_steps == steps


def test_training_leaves_taught_routers_as_they_are(
    make_context: Callable[..., StageContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the threshold moves; the forecasters learn. Taught routers are linear functions of two hidden units."""
    context = make_context(sparsity=0.25)
    context.recipe.router.teach_steps, context.recipe.router.steps = 4, 3
    run_lff(context)
    before: dict[str, torch.Tensor] = {}

    def note(objective: Any, *rest: Any) -> Any:
        parameters = context.model.adapter_parameters("router", "forecaster")
        before.update({name: parameter.detach().clone() for name, parameter in parameters.items()})
        return train(objective, *rest)

    monkeypatch.setattr(stages, "train", note)
    run_router(context)
    after = context.model.adapter_parameters("router", "forecaster")
    changed = {name for name, parameter in after.items() if not torch.equal(parameter, before[name])}
    assert {name for name in changed if "_router." in name} <= {
        name for name in after if name.endswith("_router.2.bias")
    }
    assert any("_forecaster." in name for name in changed)  # a unit that skips nothing learns nothing
