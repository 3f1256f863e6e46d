"""Every policy does what its definition says, through the same passes, stages, bundle and command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import irc
from irc.errors import InputError
from irc.model.modules import Record, RoutingControl
from irc.model.policies import make_forecaster, make_router
from irc.model.routed import RoutedForCausalLM
from irc.recipe.policies import POLICIES, policy_named
from irc.recipe.stages import required_stages
from irc.training.stages import StageContext, run_lff, run_lora, run_router
from irc.training.static_depth import drop_units, forecast_costs, unit_importance

Make = Callable[..., RoutedForCausalLM]
MakeContext = Callable[..., StageContext]
OTHERS = [name for name in POLICIES if name != "informed"]


def tape_of(model: RoutedForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Record]:
    tape: dict[str, Record] = {}
    with torch.no_grad(), model.control.using(mode="route", tape=tape):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return tape


def stream_round(model: RoutedForCausalLM, unit: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the residual stream before and after a unit, under the model's routes."""
    layer = model.graph.get_submodule(unit.block)
    after = "post_attention_layernorm" if unit.kind == "attention" else None
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: seen.__setitem__(name, args[0])

    before = layer.get_submodule("input_layernorm" if after else "post_attention_layernorm")
    handles = [before.register_forward_pre_hook(keep("before"))]
    if after:
        handles.append(layer.get_submodule(after).register_forward_pre_hook(keep("after")))
    else:
        following = model.graph.get_submodule(f"model.layers.{unit.layer + 1}.input_layernorm")
        handles.append(following.register_forward_pre_hook(keep("after")))
    model(input_ids=ids, use_cache=False)  # with gradients: the graph that skips has modules of its own
    for handle in handles:
        handle.remove()
    return seen["before"], seen["after"]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_skipgpt_leaves_the_residual_of_skipped_rows_as_it_is(
    make_routed: Make, shake: Any, ids: torch.Tensor, index: int
) -> None:
    model = shake(make_routed(policy="skipgpt"))
    unit = model.units[index]
    execute = tape_of(model, ids)[unit.name].execute
    assert 0 < int(execute.sum()) < execute.numel()
    before, after = stream_round(model, unit, ids)
    assert torch.equal(after[~execute], before[~execute])
    assert not torch.isclose(after[execute], before[execute]).all(-1).any()


@pytest.mark.parametrize(("width", "rank"), [(256, 25), (3072, 100), (4096, 100)])
def test_router_and_forecaster_together_weigh_no_more_than_skipgpt_s_router(width: int, rank: int) -> None:
    """Matrices are counted, not biases."""

    def weights(name: str) -> int:
        policy = policy_named(name)
        parts = (make_forecaster(policy, width, rank, "linear"), make_router(policy, width, rank, 0, 0.0, 0))
        return sum(p.numel() for part in parts for p in part.parameters() if p.ndim == 2)

    assert 0.99 * weights("skipgpt") <= weights("informed") <= weights("skipgpt")


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.4, 0.7, 1.0])
def test_mod_s_capacity_is_exact(make_routed: Make, shake: Any, ids: torch.Tensor, sparsity: float) -> None:
    """Of every sequence, pads left and right not counted, the same share executes in every unit."""
    model = shake(make_routed(policy="mod", sparsity=sparsity))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, -3:] = 0
    for record in tape_of(model, ids, mask).values():
        assert not record.execute[mask == 0].any()
        for row, real in enumerate((16, 11, 13, 16)):
            assert int(record.execute[row].sum()) == round((1 - sparsity) * real)


def test_mod_chooses_the_tokens_of_the_largest_difference() -> None:
    control = RoutingControl(capacity=0.5)
    difference = torch.tensor([[0.1, 3.0, -1.0, 0.5], [2.0, 2.0, 2.0, 2.0]])
    assert control.top(difference, 0.5).tolist() == [[False, True, False, True], [True, True, False, False]]


def test_random_takes_no_notice_of_the_text(make_routed: Make, ids: torch.Tensor) -> None:
    model = make_routed(policy="random", sparsity=0.4)
    big = torch.zeros(64, 64, dtype=torch.long)
    one, other = tape_of(model, big), tape_of(model, big + 7)
    for name, record in one.items():
        assert torch.equal(record.execute, other[name].execute)
        assert abs(record.execute.double().mean().item() - 0.6) < 0.04  # 4,096 draws: five standard deviations
    first, second = (one[unit.name].execute for unit in model.units[:2])
    assert 0.4 < (first == second).double().mean().item() < 0.64  # independent: 0.52 agree


def test_static_drops_whole_units_of_least_importance(make_routed: Make, ids: torch.Tensor) -> None:
    model = make_routed(policy="static")
    figures = drop_units(model, ids, 0.5)
    importance = figures["importance"]
    dropped = {name for name, keep in figures["calibration_keep"].items() if keep == 0}
    assert len(dropped) == 2
    assert max(importance[name] for name in dropped) <= min(
        importance[name] for name in importance if name not in dropped
    )
    for name, record in tape_of(model, ids).items():
        assert bool(record.execute.all()) == (name not in dropped)
        assert bool(record.execute.any()) == (name not in dropped)


def test_importance_is_how_far_a_unit_turns_the_stream(make_routed: Make, ids: torch.Tensor) -> None:
    model = make_routed(policy="static")
    found = unit_importance(model, ids)
    for unit in model.units[:3]:
        before, after = stream_round(model, unit, ids)
        assert found[unit.name] == pytest.approx(
            (1 - F.cosine_similarity(before, after, dim=-1)).mean().item(), abs=1e-6
        )


def test_a_forecast_costs_the_loss_that_it_adds_alone(make_routed: Make, shake: Any, ids: torch.Tensor) -> None:
    model = shake(make_routed(policy="static-forecast"))
    costs = forecast_costs(model, ids)
    full = {unit.name: torch.ones_like(ids, dtype=torch.bool) for unit in model.units}

    def loss(masks: dict[str, torch.Tensor]) -> float:
        with torch.no_grad(), model.control.using(mode="forced", masks=masks):
            return float(model(input_ids=ids, labels=ids).loss)

    for name, cost in costs.items():
        assert cost == pytest.approx(loss(full | {name: ~full[name]}) - loss(full), abs=1e-5)
    dropped = {name for name, keep in drop_units(model, ids, 0.5)["calibration_keep"].items() if keep == 0}
    assert dropped == set(sorted(costs, key=costs.__getitem__)[:2])
    for name, record in tape_of(model, ids).items():
        assert bool(record.execute.any()) == bool(record.execute.all()) == (name not in dropped)


@pytest.mark.parametrize("rate", [0.0, 2e-3])
def test_forecasts_of_whole_units_learn_only_if_asked(make_context: MakeContext, rate: float) -> None:
    context = make_context(sparsity=0.5, policy="static-forecast")
    context.recipe.router.forecaster_lr = rate
    run_lff(context)
    before = {name: value.clone() for name, value in context.model.adapter_parameters("forecaster").items()}
    figures = run_router(context)
    after = context.model.adapter_parameters("forecaster")
    moved = {name.partition("_forecaster")[0] for name in before if not torch.equal(after[name], before[name])}
    skipped = {name for name, keep in figures["calibration_keep"].items() if keep == 0}
    assert moved == (skipped if rate else set())
    assert ("train_seconds" in figures) == bool(rate)


@pytest.mark.parametrize("policy", OTHERS)
def test_training_moves_what_the_policy_trains_and_nothing_else(make_context: MakeContext, policy: str) -> None:
    context = make_context(sparsity=0.5, policy=policy)
    if policy_named(policy).forecasts:
        run_lff(context)
    before = {name: value.clone() for name, value in context.model.graph.named_parameters()}
    figures = run_router(context)
    moved = {name for name, value in context.model.graph.named_parameters() if not torch.equal(value, before[name])}
    roles = {
        "skipgpt": {"_router"},
        "mod": {"_router"},
        "random": {"_forecaster"},
        "static": {"_router"},
        "static-forecast": {"_router", "_forecaster"},
    }[policy]
    assert moved
    assert all(any(role in name for role in roles) for name in moved), moved
    assert figures["calibration_sparsity"] == pytest.approx(0.5, abs=0.02)
    assert set(figures["calibration_keep"]) == {unit.name for unit in context.model.units}


@pytest.mark.parametrize("policy", OTHERS)
def test_lora_trains_under_every_policy(make_context: MakeContext, policy: str) -> None:
    context = make_context(sparsity=0.5, policy=policy)
    if policy_named(policy).whole_units:  # otherwise nothing is skipped, and the divergence from the base is zero
        drop_units(context.model, context.calibration_windows(), 0.5)
    figures = run_lora(context)
    assert figures["loss"] > 0
    assert "calibration_keep" in figures


@pytest.mark.parametrize("policy", OTHERS)
def test_bundles_come_back(make_routed: Make, ids: torch.Tensor, tmp_path: Path, policy: str, shake: Any) -> None:
    model = make_routed(policy=policy, sparsity=0.5)
    shake(model)
    if policy_named(policy).whole_units:
        drop_units(model, ids, 0.5)
    model.save_pretrained(tmp_path / "b")
    loaded = irc.load(tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("policy", ["mod", "random"])
def test_policies_of_whole_sequences_neither_generate_nor_export(
    make_routed: Make, ids: torch.Tensor, tmp_path: Path, irc_main: Any, policy: str
) -> None:
    model = make_routed(policy=policy, sparsity=0.5)
    with pytest.raises(InputError, match=policy):
        model.generate(ids[:1], max_new_tokens=2)
    model.save_pretrained(tmp_path / "b")
    outcome = irc_main("export", tmp_path / "b", "-o", tmp_path / "onnx")
    assert outcome.code == 2
    assert policy in outcome.sentence()
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("policy", ["skipgpt", "static", "static-forecast"])
def test_the_others_export_and_verify(
    make_routed: Make, shake: Any, ids: torch.Tensor, tmp_path: Path, irc_main: Any, text_file: Path, policy: str
) -> None:
    model = shake(make_routed(policy=policy))
    if policy_named(policy).whole_units:
        drop_units(model, ids, 0.5)
    model.save_pretrained(tmp_path / "b")
    assert irc_main("export", tmp_path / "b", "-o", tmp_path / "onnx").code == 0
    outcome = irc_main("verify", tmp_path / "onnx", "--data", text_file, "--seq-len", "16", "--json")
    assert outcome.code == 0, outcome.out
    assert outcome.json["routing_agreement"] == 1.0


def test_an_unknown_policy_and_wrong_stages_are_refused(
    irc_main: Any, convert_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    outcome = irc_main(*convert_arguments(tmp_path / "b"), "--policy", "greedy")
    assert outcome.code == 2
    for name in ("'greedy'", "informed", "skipgpt", "mod", "random", "static"):
        assert name in outcome.sentence()
    outcome = irc_main(*convert_arguments(tmp_path / "b"), "--policy", "skipgpt", "--stages", "lff,router")
    assert outcome.code == 2
    assert "skipgpt" in outcome.sentence()


@pytest.mark.parametrize("policy", OTHERS)
def test_convert_runs_every_policy(
    irc_main: Any, convert_arguments: Callable[..., list[str]], tmp_path: Path, policy: str
) -> None:
    outcome = irc_main(*convert_arguments(tmp_path / "b"), "--policy", policy, "--sparsity", "0.5")
    assert outcome.code == 0, outcome.err
    assert outcome.json["sparsity"]["realized"] == pytest.approx(0.5, abs=0.06)
    assert outcome.json["stages"].keys() == set(required_stages(policy_named(policy)))
