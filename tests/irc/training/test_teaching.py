"""Teaching: routers learn the cost of a forecast, to first order, and start at the target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from irc.conversion.pipeline import resolve
from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import Recipe
from irc.training import stages
from irc.training.loop import LoopResult, train
from irc.training.objectives import RoutingObjective
from irc.training.stages import StageContext, run_lff, run_router
from irc.training.teaching import TeachObjective, _probing


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
    gradients = torch.autograd.grad(loss, [probe for probe, _, _ in seen])
    for unit in range(len(model.units)):
        first = (gradients[unit] * seen[unit][1]).sum().item()
        measured = (loss_of(1e-3, unit) - loss_of(-1e-3, unit)) / 2e-3
        assert measured == pytest.approx(first, rel=1e-3, abs=0.01)  # norms are computed in float32


def test_teaching_trains_routers_alone_and_explains_the_cost(make_context: Callable[..., StageContext]) -> None:
    context = make_context(sparsity=0.4)
    run_lff(context)
    model = context.model
    model.requires_grad_(False)
    for parameter in model.adapter_parameters("router").values():
        parameter.requires_grad_(True)
    objective = TeachObjective(model, 1e-2, 0.4)
    optimizer = torch.optim.Adam(objective.trainable()[0]["params"].values(), lr=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    windows = context.train_windows()[:64]
    explained = []
    for step in range(40):
        loss, figures = objective(windows, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        explained.append(figures["explained"])
    assert explained[-1] > 0.05 > explained[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not p.requires_grad)
    assert not any(model.part(unit, "router")._forward_pre_hooks for unit in model.units)


@pytest.mark.parametrize("target", [0.25, 0.7])
def test_routes_sampled_by_taught_routers_begin_near_the_target(
    make_context: Callable[..., StageContext], monkeypatch: pytest.MonkeyPatch, target: float
) -> None:
    context = make_context(sparsity=target)
    run_lff(context)
    context.recipe.router.teach_steps, context.recipe.router.lr = 60, 1e-2
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


@pytest.mark.parametrize(("bar", "step"), [("teach", 4), ("router", 4)])
def test_a_killed_stage_counts_the_seconds_of_its_teaching(
    make_context: Callable[..., StageContext],
    bars: Any,
    killed: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bar: str,
    step: int,
) -> None:
    results: list[LoopResult] = []

    def note(*arguments: Any) -> LoopResult:
        results.append(train(*arguments))
        return results[-1]

    monkeypatch.setattr(stages, "train", note)

    def context(made: Any) -> StageContext:
        context = make_context(made)
        context.work, context.recipe.checkpoint_seconds = tmp_path, 0.0
        context.recipe.router.teach_steps, context.recipe.router.steps = 8, 8
        return context

    with pytest.raises(killed):
        run_router(context(bars((bar, step))))
    taught = [result.seconds for result in results]  # seconds of teaching that was not killed
    seconds, cpu = run_router(context(bars()))["earlier_seconds"]
    assert cpu > 0
    if bar == "router":
        assert taught[0] < seconds == results[-1].earlier_runs[0]
    else:
        assert seconds == results[-2].earlier_runs[0] < results[-2].seconds  # the teaching that was resumed


@pytest.mark.parametrize(
    ("policy", "sparsity", "asked", "steps"),
    [
        ("informed", 0.25, -1, 30),
        ("informed", 0.5, -1, 30),
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
