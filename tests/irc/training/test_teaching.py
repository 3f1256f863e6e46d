"""Teaching: routers learn the cost of a forecast, to first order, and start at the target."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from irc.conversion.pipeline import resolve
from irc.model.modules import difference_of
from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import Recipe
from irc.training import stages
from irc.training.budget import Budget, plain_budget
from irc.training.closed_form import UnitStatistics
from irc.training.loop import train
from irc.training.objectives import RoutingObjective
from irc.training.stages import StageContext, run_lff, run_router
from irc.training.teaching import _costs, _probing, _Statistics, teach_routers


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


def test_teaching_sets_routers_alone_and_explains_the_cost(
    make_context: Callable[..., StageContext], bars: Any
) -> None:
    context = make_context(sparsity=0.4)
    run_lff(context)
    model = context.model
    routers = model.adapter_parameters("router")
    before = {name: p.clone() for name, p in model.graph.named_parameters() if name not in routers}
    batches = context.train_windows()[:640].split(64)
    with bars()("teach", 10) as bar:
        figures = teach_routers(model, batches, _budget(model, 0.4), 0, bar)
    assert 0.05 < figures["explained"] < 1
    assert all(torch.equal(p, before[name]) for name, p in model.graph.named_parameters() if name in before)
    assert not any(model.part(unit, "router")._forward_pre_hooks for unit in model.units)


def test_taught_routers_are_the_ridge_regression_of_the_costs(
    make_routed: Callable[..., RoutedForCausalLM], shake: Any, ids: torch.Tensor, bars: Any
) -> None:
    """The logit difference is linear in x, with the weights that minimize squared error + damping * |weights|^2."""
    model = shake(make_routed())
    batches = torch.randint(0, 256, (48, ids.shape[1]), generator=torch.Generator().manual_seed(1)).split(12)
    budget = _budget(model, 0.3)
    costs, read = zip(*(_costs(model, batch, index) for index, batch in enumerate(batches)), strict=True)
    with bars()("teach", 4) as bar:
        teach_routers(model, batches, budget, 0, bar, sampled=True)
    saved = torch.tensor([budget.weights[unit.name] for unit in model.units]).double().log()
    wanted = torch.cat(costs, dim=1) - saved[:, None]
    wanted = (wanted - wanted.mean()) / wanted.std(correction=0) + math.log(0.7 / 0.3)
    for index, unit in enumerate(model.units):
        x = torch.cat([part[index] for part in read]).double()
        centred = x - x.mean(0)
        damping = 0.3 * centred.square().mean() * len(x)
        weight = torch.linalg.solve(
            centred.T @ centred + damping * torch.eye(x.shape[1]).double(),
            centred.T @ (wanted[index] - wanted[index].mean()),
        )
        found = difference_of(model.part(unit, "router")(x.float()))
        assert found.double().tolist() == pytest.approx((centred @ weight + wanted[index].mean()).tolist(), abs=1e-3)


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


def test_costs_are_those_of_the_predictions_of_the_model(
    make_routed: Callable[..., RoutedForCausalLM], shake: Any, ids: torch.Tensor
) -> None:
    """The mean square of many draws is twice the KL of a small step towards the forecast, over the step's square."""
    model = shake(make_routed())
    last = model.units[-1]  # a change of it at one token reaches the predictions of this token alone
    squares = torch.stack([_costs(model, ids, seed)[0][-1].exp() for seed in range(60)]).mean(0)
    step = 0.03

    @torch.no_grad()
    def predictions() -> torch.Tensor:
        with model.control.using(mode="execute"):
            return model.logits(model.states(ids))[:, :-1].double().log_softmax(-1)

    dense = predictions()
    handle = model.part(last, "mux").register_forward_hook(
        lambda _, arguments, output: output + step * (arguments[1] - arguments[0])
    )
    divergence = (dense.exp() * (dense - predictions())).sum(-1)
    handle.remove()
    assert squares.sum().item() == pytest.approx(2 * divergence.sum().item() / step**2, rel=0.1)


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


def test_sums_over_many_tokens_are_not_rounded_to_bf16() -> None:
    x, y = (torch.randn(200, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact, cast = (_Statistics(8, torch.device("cpu")) for _ in range(2))
    exact_unit, cast_unit = (UnitStatistics(8) for _ in range(2))
    exact.add(x, y[:, 0].double())
    exact_unit.add(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(x, y[:, 0].double())
        cast_unit.add(x, y)
    assert torch.equal(cast.xx, exact.xx)
    assert torch.equal(cast_unit.xx, exact_unit.xx)
    assert torch.equal(cast_unit.xy, exact_unit.xy)
