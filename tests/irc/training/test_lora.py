"""LoRA with peft: saved adapters load again, and peft can read them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from irc.errors import InputError
from irc.model.routed import RoutedForCausalLM
from irc.recipe.stages import LoraRecipe
from irc.training.lora import WEIGHTS, adapters_off, inject_lora, load_lora, lora_config, lora_parameters, save_lora
from irc.training.stages import StageContext, run_lora

Make = Callable[..., RoutedForCausalLM]
RECIPE = LoraRecipe(rank=2)


def logits(model: RoutedForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_fresh_adapters_change_nothing(make_routed: Make, shake: Any, ids: torch.Tensor) -> None:
    model = shake(make_routed())
    before = logits(model, ids)
    inject_lora(model, RECIPE, 0)
    assert torch.equal(logits(model.eval(), ids), before)


def test_round_trip_gives_equal_logits(
    make_routed: Make, shake: Any, lora_on: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    plain = logits(shake(make_routed()), ids)
    model = lora_on(shake(make_routed()))
    expected = logits(model, ids)
    assert not torch.allclose(expected, plain, atol=1e-2)
    save_lora(model, tmp_path / "lora")
    other = shake(make_routed())
    load_lora(other, tmp_path / "lora", RECIPE)
    assert torch.equal(logits(other.eval(), ids), expected)
    assert not any(parameter.requires_grad for parameter in lora_parameters(other).values())


def test_adapters_sit_on_the_named_linears_of_every_layer(make_routed: Make) -> None:
    model = make_routed()
    inject_lora(model, LoraRecipe(rank=2, targets=["q_proj", "gate_proj"]), 0)
    owners = {name.split(".lora_")[0].rpartition(".")[2] for name in lora_parameters(model)}
    assert owners == {"q_proj", "gate_proj"}
    assert len(lora_parameters(model)) == 2 * 2 * model.config.num_hidden_layers  # A and B of each


def test_peft_reads_the_folder(make_routed: Make, lora_on: Any, tmp_path: Path) -> None:
    model = lora_on(make_routed())
    save_lora(model, tmp_path)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.peft_type, config.task_type, config.inference_mode) == ("LORA", "CAUSAL_LM", True)
    assert (config.r, config.lora_alpha) == (2, RECIPE.alpha)  # type: ignore[attr-defined]
    saved = load_file(tmp_path / WEIGHTS)
    assert len(saved) == len(lora_parameters(model))
    assert all(name.startswith("base_model.model.") for name in saved)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors", ".md")]


@pytest.mark.parametrize("target", ["w_proj", "proj", "lm_head", "embed_tokens"])
def test_an_unknown_target_is_refused(make_routed: Make, target: str) -> None:
    with pytest.raises(InputError, match=rf"lora\.targets: .*'{target}'"):
        lora_config(make_routed(), LoraRecipe(targets=["q_proj", target]))


@pytest.mark.parametrize("how", ["missing", "truncated", "foreign", "incomplete", "other shape"])
def test_damaged_adapters_are_refused(make_routed: Make, lora_on: Any, tmp_path: Path, how: str) -> None:
    save_lora(lora_on(make_routed()), tmp_path)
    path = tmp_path / WEIGHTS
    tensors = load_file(path)
    first = sorted(tensors)[0]
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif how == "foreign":
        save_file({**tensors, "base_model.model.other.lora_A.weight": torch.zeros(2, 2)}, path)
    elif how == "incomplete":
        save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    else:
        save_file({**tensors, first: torch.zeros(3, 5)}, path)
    with pytest.raises(InputError, match=f"^{tmp_path}"):
        load_lora(make_routed(), tmp_path, RECIPE)


def test_the_stage_changes_the_adapters_and_nothing_else(
    make_context: Callable[..., StageContext], shake: Any, ids: torch.Tensor
) -> None:
    context = make_context()
    shake(context.model)
    before = copy.deepcopy(context.model.state_dict())
    figures = run_lora(context)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in context.model.state_dict().items()}
    for name, tensor in before.items():
        if not name.endswith("_router.2.bias"):  # the threshold is set again
            assert torch.equal(after[name], tensor), name
    trained = lora_parameters(context.model)
    assert all(float(parameter.detach().abs().max()) > 0 for name, parameter in trained.items() if "lora_B" in name)
    assert abs(figures["calibration_sparsity"] - 0.25) <= 0.01


@pytest.mark.parametrize(("rates", "learns"), [((1e-2, 0.0), "forecaster"), ((0.0, 1e-2), "router")])
def test_forecasters_or_routers_learn_along_when_asked(
    make_context: Callable[..., StageContext], shake: Any, rates: tuple[float, float], learns: str
) -> None:
    context = make_context()
    shake(context.model)
    context.recipe.lora.forecaster_lr, context.recipe.lora.router_lr = rates
    before = copy.deepcopy(context.model.state_dict())
    figures = run_lora(context)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in context.model.state_dict().items()}
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    kept = {name for name in changed if f"_{learns}." not in name and not name.endswith("_router.2.bias")}
    assert not kept
    assert {name for name in before if f"_{learns}." in name} <= changed
    assert abs(figures["calibration_sparsity"] - 0.25) <= 0.01


def test_a_policy_without_routers_to_train_keeps_its_routes(make_context: Callable[..., StageContext]) -> None:
    """Other policies with LoRA: the dense model with the same LoRA budget, and whole units dropped."""
    context = make_context(policy="static")
    context.model.part(context.model.units[0], "router").choose(False)
    before = copy.deepcopy(context.model.adapter_parameters("router"))
    context.recipe.lora.router_lr = 3.0
    figures = run_lora(context)
    assert figures["sparsity"] == pytest.approx(1 / len(context.model.units))
    for name, parameter in context.model.adapter_parameters("router").items():
        assert torch.equal(parameter, before[name])


def test_without_adapters_the_model_is_the_base(make_routed: Make, lora_on: Any, shake: Any, ids: torch.Tensor) -> None:
    model = shake(make_routed())
    with torch.no_grad(), model.control.using(mode="execute"):
        plain = model(input_ids=ids).logits
        lora_on(model)
        model.train()
        adapted = model(input_ids=ids).logits
        with adapters_off(model):
            again = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert not torch.allclose(adapted, plain, atol=1e-3)
    torch.testing.assert_close(again, plain)
    assert not torch.allclose(after, plain, atol=1e-3)


def test_a_rank_beyond_the_width_is_refused_before_any_work(
    irc_main: Callable[..., Any], convert_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    wide = ("--stages", "lff,router,lora", "--set", "lora.rank=33")
    refused = irc_main(*convert_arguments(tmp_path / "b"), *wide)
    assert (refused.code, "lora.rank is 33" in refused.sentence(), " 32" in refused.sentence()) == (2, True, True)
    assert not (tmp_path / "b.partial").exists()
