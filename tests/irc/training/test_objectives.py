"""The losses of the stages, term by term, compared with direct computations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from irc.model.checkpoint import BaseModel
from irc.model.modules import Record
from irc.model.routed import RoutedForCausalLM
from irc.recipe.stages import RouterRecipe
from irc.training.budget import plain_budget
from irc.training.objectives import ForecastObjective, RoutingObjective, _straight_through

Make = Callable[..., RoutedForCausalLM]
STEPS = 11


@pytest.fixture
def model(make_routed: Make, shake: Any) -> RoutedForCausalLM:
    model: RoutedForCausalLM = shake(make_routed())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.adapter_parameters("router").values():
        parameter.requires_grad_(True)
    return model


def objective(model: RoutedForCausalLM, sparsity: float = 0.25, lora: Any = (), **recipe: Any) -> RoutingObjective:
    budget = plain_budget([unit.name for unit in model.units], sparsity)
    return RoutingObjective(model, RouterRecipe(**{"distill": 0.0, **recipe}), budget, seed=0, steps=STEPS, lora=lora)


def sampled(model: RoutedForCausalLM, one: RoutingObjective, ids: torch.Tensor, step: int) -> dict[str, Record]:
    """Return the records of the objective's sampled forward pass."""
    tape: dict[str, Record] = {}
    with model.control.using(tape=tape, measure_error=True, **one._routing(ids, step)):
        model(input_ids=ids, use_cache=False)
    return tape


def cross_entropy(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def test_language_model_term_is_the_plain_cross_entropy_when_all_execute(
    model: RoutedForCausalLM, base: BaseModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    one = objective(model, sparsity=0.0, cosine_weight=0.0)
    monkeypatch.setattr(one, "_routing", lambda windows, step: {"mode": "execute"})
    with torch.no_grad():
        loss, figures = one(ids, 0)
        eager = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
        expected = cross_entropy(eager, ids)
    assert figures["sparsity"] == 0.0
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    assert figures["lm"] == pytest.approx(expected.item(), abs=1e-5)


def test_language_model_term_is_that_of_the_sampled_routes(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    one = objective(model, cosine_weight=0.0, sparsity_weight=0.0)
    tape = sampled(model, one, ids, 3)
    with torch.no_grad():
        loss, figures = one(ids, 3)
        masks = {name: record.execute for name, record in tape.items()}
        with model.control.using(mode="forced", masks=masks):
            expected = cross_entropy(model, ids)
    assert 0.2 < figures["sparsity"] < 0.8
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 1.0])
def test_sparsity_term_and_its_gradient(model: RoutedForCausalLM, ids: torch.Tensor, sparsity: float) -> None:
    weight = 8.0
    with_term = objective(model, sparsity, cosine_weight=0.0, sparsity_weight=weight)
    without = objective(model, sparsity, cosine_weight=0.0, sparsity_weight=0.0)
    routers = list(model.adapter_parameters("router").values())
    loss, figures = with_term(ids, 2)
    plain, _ = without(ids, 2)
    gap = (1 - figures["sparsity"]) - (1 - sparsity)
    assert gap != 0
    assert float((loss - plain).detach()) == pytest.approx(weight * abs(gap), abs=1e-5)
    found = [
        a - b for a, b in zip(torch.autograd.grad(loss, routers), torch.autograd.grad(plain, routers), strict=True)
    ]
    soft = torch.stack([record.soft.mean() for record in sampled(model, with_term, ids, 2).values()]).mean()  # type: ignore[union-attr]
    sign = 1.0 if gap > 0 else -1.0
    expected = torch.autograd.grad(weight * sign * soft, routers)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-3


def test_cosine_term_counts_skipped_pairs_only(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    weight = 0.7
    one = objective(model, cosine_weight=weight, sparsity_weight=0.0)
    with torch.no_grad():
        tape = sampled(model, one, ids, 1)
        loss, figures = one(ids, 1)
    skipped = [1 - record.cosine[~record.execute] for record in tape.values()]  # type: ignore[index]
    everything = [1 - record.cosine for record in tape.values()]  # type: ignore[operator]
    expected = weight * torch.cat(skipped).mean().item()
    assert float(loss) - figures["lm"] == pytest.approx(expected, abs=1e-5)
    assert abs(weight * torch.stack(everything).mean().item() - expected) > 1e-4  # the tokens matter


def test_no_skipped_pair_gives_no_cosine_term(
    model: RoutedForCausalLM, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = objective(model, cosine_weight=1.0, sparsity_weight=0.0)
    monkeypatch.setattr(one, "_routing", lambda windows, step: {"mode": "execute"})
    loss, figures = one(ids, 0)
    assert loss.item() == pytest.approx(figures["lm"], rel=1e-6)


def test_temperature_falls_linearly(model: RoutedForCausalLM) -> None:
    one = objective(model, temperature_start=5.0, temperature_end=1.0)
    assert [one.temperature(step) for step in (0, (STEPS - 1) // 2, STEPS - 1)] == pytest.approx([5.0, 3.0, 1.0])


def test_routers_get_gradients_and_the_base_gets_none(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    loss, _ = objective(model)(ids, 0)
    loss.backward()
    routers = {id(parameter) for parameter in model.adapter_parameters("router").values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in routers:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("forecaster_lr", [0.0, 1e-3])
def test_forecasters_learn_along_only_when_asked(model: RoutedForCausalLM, forecaster_lr: float) -> None:
    groups = objective(model, forecaster_lr=forecaster_lr, lr=0.5).trainable()
    assert [group["lr"] for group in groups] == ([0.5] if forecaster_lr == 0 else [0.5, forecaster_lr])
    names = {name for group in groups for name in group["params"]}
    assert any("forecaster" in name for name in names) == (forecaster_lr > 0)


def test_extra_parameters_train_alone_with_deterministic_routes(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    extra = torch.nn.Parameter(torch.zeros(1))
    one = objective(model, lora=[{"params": {"extra": extra}, "lr": 0.1}])
    (group,) = one.trainable()
    assert group["params"] == {"extra": extra}
    with torch.no_grad():
        assert one(ids, 0)[0].item() == one(ids, 5)[0].item()  # no noise, no temperature


def test_forecast_objective_is_l1_plus_one_minus_cosine(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    inputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        model.part(unit, "mux").register_forward_pre_hook(
            lambda module, arguments: inputs.update({module.unit: (arguments[0], arguments[1])})
        )
        for unit in model.units
    ]
    with torch.no_grad():
        loss, figures = ForecastObjective(model, 1e-3)(ids, 0)
    for handle in handles:
        handle.remove()
    assert len(inputs) == len(model.units)
    errors = [(forecast - y).abs().mean() for y, forecast in inputs.values()]
    cosines = [F.cosine_similarity(forecast, y, dim=-1).mean() for y, forecast in inputs.values()]
    expected = sum(float(error + 1 - cosine) for error, cosine in zip(errors, cosines, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert figures["cosine"] == pytest.approx(float(torch.stack(cosines).mean()), rel=1e-5)


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    soft = torch.tensor([[0.9, 0.2, 0.7]], requires_grad=True)
    value = _straight_through(Record(execute=soft >= 0.5, soft=soft))
    assert value.item() == pytest.approx(2 / 3)
    value.backward()
    torch.testing.assert_close(soft.grad, torch.full((1, 3), 1 / 3))


def test_distillation_is_the_divergence_from_the_dense_model(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    options = {"cosine_weight": 0.0, "sparsity_weight": 0.0}
    one = objective(model, distill=1.0, **options)
    loss, _ = one(ids, 4)
    with torch.no_grad():
        with model.control.using(mode="execute"):
            dense = model(input_ids=ids, use_cache=False).logits[:, :-1].softmax(-1)
        with model.control.using(**one._routing(ids, 4)):
            routed = model(input_ids=ids, use_cache=False).logits[:, :-1].softmax(-1)
        expected = (dense * (dense / routed).log()).sum(-1).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)
    assert loss.item() > 1e-3
    loss.backward()
    assert all(p.grad is not None for p in model.adapter_parameters("router").values())
    plain, _ = objective(model, **options)(ids, 4)
    half, _ = objective(model, distill=0.5, **options)(ids, 4)
    torch.testing.assert_close(half, (plain + loss) / 2)


def test_without_noise_sampling_is_the_deterministic_route(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    last = sampled(model, objective(model, noise=0.0), ids, STEPS - 1)
    tape: dict[str, Record] = {}
    with model.control.using(mode="route", tape=tape):
        model(input_ids=ids, use_cache=False)
    assert all(torch.equal(last[unit].execute, record.execute) for unit, record in tape.items())
    noisy = sampled(model, objective(model), ids, STEPS - 1)
    assert not all(torch.equal(noisy[unit].execute, record.execute) for unit, record in tape.items())


@pytest.mark.parametrize("router_lr", [0.0, 0.2])
def test_in_the_lora_stage_routes_are_sampled_where_routers_learn(
    model: RoutedForCausalLM, ids: torch.Tensor, router_lr: float
) -> None:
    groups = [{"params": model.adapter_parameters("router"), "lr": router_lr}]
    recipe = RouterRecipe(temperature_end=0.7)
    budget = plain_budget([unit.name for unit in model.units], 0.25)
    one = RoutingObjective(model, recipe, budget, 0, STEPS, lora=groups, sampled=router_lr > 0)
    routing = one._routing(ids, 0)
    assert routing["mode"] == ("sample" if router_lr else "route")
    if router_lr:
        assert routing["temperature"] == 0.7
        one(ids, 0)[0].backward()
        assert all(parameter.grad is not None for parameter in groups[0]["params"].values())


def held(model: RoutedForCausalLM, sparsity: float = 0.25, **recipe: Any) -> RoutingObjective:
    """Return an objective of taught routers, whose threshold follows the target."""
    return objective(model, sparsity, **{"teach_steps": 1, "cosine_weight": 0.0, **recipe})


@pytest.mark.parametrize("target", [0.1, 0.25, 0.9])
def test_the_threshold_of_taught_routers_follows_the_target(
    model: RoutedForCausalLM, ids: torch.Tensor, target: float
) -> None:
    one = held(model, target)
    with torch.no_grad():
        reached = [one(ids, step)[1]["sparsity"] for step in range(20)]
    assert abs(reached[0] - target) > 0.1
    assert reached[-1] == pytest.approx(target, abs=0.05)


def test_executing_costs_the_kl_over_the_skipped_share(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    one, free = (held(model, distill=1.0, lr=1e-3, sparsity_weight=weight) for weight in (2.0, 0.0))
    loss, figures = one(ids, 0)
    divergence, _ = free(ids, 0)
    assert divergence > 0
    assert one.state()["price"] == pytest.approx(float(divergence.detach()) / 0.25, rel=1e-5)
    expected = 2 * one.state()["price"] * (1 - figures["sparsity"])
    assert float((loss - divergence).detach()) == pytest.approx(expected, rel=1e-4)


def test_what_taught_routers_read_has_a_price_too(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    one, free = (held(model, distill=1.0, sparsity_weight=weight) for weight in (2.0, 0.0))
    parameter = next(iter(model.adapter_parameters("forecaster").values())).requires_grad_(True)
    gradients = [torch.autograd.grad(found(ids, 0)[0], parameter)[0] for found in (one, free)]
    assert not torch.equal(*gradients)  # of a forecaster, though the routers are not trained
    kept = [group for group in one.trainable() if group["lr"] == 0]
    assert [group["params"].keys() for group in kept] == [model.adapter_parameters("router").keys()]  # in checkpoints


def test_the_price_is_that_of_the_kl_alone(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    mixed, pure, none = (held(model, distill=share, lr=1e-3) for share in (0.5, 1.0, 0.0))
    with torch.no_grad():
        for one in (mixed, pure, none):
            one(ids, 0)
    assert mixed.state()["price"] == pytest.approx(pure.state()["price"], rel=1e-3)
    assert none.state()["price"] == 0.0


def test_inference_takes_over_the_threshold(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    one = held(model, 0.1)
    with torch.no_grad():
        for step in range(20):
            one(ids, step)
        trained = {name: record.execute for name, record in sampled(model, one, ids, 20).items()}
        one.fold_threshold()
        tape: dict[str, Record] = {}
        with model.control.using(mode="route", tape=tape):
            model(input_ids=ids, use_cache=False)
    assert all(torch.equal(record.execute, trained[name]) for name, record in tape.items())
    assert one.state()["threshold"] == 0.0


def test_an_objective_continues_at_the_threshold_of_its_checkpoint(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    whole, first, second = (held(model, distill=1.0) for _ in range(3))
    with torch.no_grad():
        for step in range(3):
            whole(ids, step)
        first(ids, 0)
        second.restore(first.state())
        for step in (1, 2):
            second(ids, step)
    assert second.state() == whole.state() != first.state()


@pytest.mark.parametrize("recipe", [{"teach_steps": 0}, {"noise": 0.5}])
def test_sampled_routes_have_no_threshold_to_follow(
    model: RoutedForCausalLM, ids: torch.Tensor, recipe: dict[str, Any]
) -> None:
    one = held(model, **recipe)
    with torch.no_grad():
        one(ids, 0)
    assert one.state() == {"threshold": 0.0}
