"""Activation checkpointing keeps fewer tensors and computes the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import Recipe
from irc.training.budget import plain_budget
from irc.training.objectives import RoutingObjective
from irc.training.recompute import recomputing
from irc.training.stages import StageContext, run_lff, run_lora, run_router

Make = Callable[..., RoutedForCausalLM]


def gradients(model: RoutedForCausalLM, ids: torch.Tensor, on: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients of a router step, and how many numbers were kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    budget = plain_budget([unit.name for unit in model.units], 0.25)
    objective = RoutingObjective(model, Recipe().router, budget, 0, 11)
    with recomputing(model, on):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = objective(ids, 3)
        loss.backward()  # by now the control is back in mode route
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, sum(kept.values())


def test_gradients_are_the_same_and_less_is_kept(make_routed: Make, shake: Any, ids: torch.Tensor) -> None:
    model = shake(make_routed()).train()
    model.requires_grad_(False)
    for parameter in model.adapter_parameters("router", "forecaster").values():
        parameter.requires_grad_(True)
    plain, much = gradients(model, ids, on=False)
    again, little = gradients(model, ids, on=True)
    assert set(plain) == set(again) == {f"graph.{name}" for name in model.adapter_parameters("router", "forecaster")}
    for name, gradient in plain.items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=0)
    assert little < 0.5 * much
    assert model.control.mode == "route"
    assert model.control.tape is None


def test_every_stage_runs_and_ends_alike(make_context: Callable[..., StageContext], tmp_path: Path) -> None:
    """LoRA's dropout draws the same mask when a layer is computed again."""
    found = []
    for checkpointing in (False, True):
        context = make_context()
        context.work = tmp_path / str(checkpointing)
        context.work.mkdir()
        context.recipe.activation_checkpointing = checkpointing
        context.recipe.router.teach_steps = 2
        for stage in (run_lff, run_router, run_lora):
            stage(context)
        found.append({name: tensor.clone() for name, tensor in context.model.state_dict().items()})
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-6)
