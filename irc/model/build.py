"""Builds models from a base on disk: plain, or with untrained routers and forecasters around every unit."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from irc.errors import InputError
from irc.model.architectures import SUPPORTED
from irc.model.capture import Captured, assign_weights, capture
from irc.model.checkpoint import BaseModel
from irc.model.modules import BottleneckRouter, Forecaster, Mux, RoutingControl
from irc.model.policies import RandomRouter, make_forecaster, make_router
from irc.model.routed import RoutedForCausalLM, RoutingSpec
from irc.model.stored import StoredWeights
from irc.recipe.policies import Policy, policy_named
from irc.recipe.recipe import default_ffn_rank, default_rank
from irc.recipe.stages import TAUGHT_HIDDEN
from passes.base import PassManager
from passes.insert_forecasters import InsertForecasters
from passes.insert_routers import InsertRouters, Reads
from passes.match import MatchResult, Unit, match_units
from passes.split_fused_linears import SplitFusedLinears

log = logging.getLogger(__name__)


def build_plain(
    base: BaseModel, dtype: str = "auto", device: str = "cpu", *, as_stored: bool = False
) -> RoutedForCausalLM:
    """Capture a base model without inserting anything.

    Args:
        base: Model on disk.
        dtype: `auto` (fp32, or bf16 for checkpoints over 2 GB), `fp32`, `fp16` or `bf16`.
        device: Where it will run.
        as_stored: Whether large weights stay in their file's type. The model can then be exported, but not run.

    Raises:
        InputError: The model cannot be captured.
    """
    captured = _captured(base, dtype, device, as_stored)
    return _ready(RoutedForCausalLM(captured, match_units(captured.graph), RoutingControl(), None, base))


def build_routed(
    base: BaseModel,
    spec: RoutingSpec,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    *,
    as_stored: bool = False,
) -> RoutedForCausalLM:
    """Capture a base model and insert untrained forecasters, routers and muxes around every unit.

    Args:
        base: Model on disk.
        spec: What to insert.
        dtype: `auto` (fp32, or bf16 for checkpoints over 2 GB), `fp32`, `fp16` or `bf16`.
        device: Where it will run.
        seed: Seed of the inserted modules' initial weights.
        as_stored: Whether large weights stay in their file's type. The model can then be exported, but not run.

    Raises:
        InputError: The model cannot be captured, it has no unit that can be routed, or the rank is too large.
    """
    captured = _captured(base, dtype, device, as_stored)
    match = match_units(captured.graph)
    _refuse_without_units(match, base)
    if match.refusals:
        first = match.refusals[0]
        log.warning("%d submodules are not routed. The first is %s: %s", len(match.refusals), first.name, first.reason)
    for unit in match.units:
        name = "ffn_rank" if unit.kind == "ffn" and spec.ffn_rank else "rank"
        if (rank := spec.rank_of(unit)) > unit.width:
            raise InputError(
                f"{name} is {rank}, but {unit.name} has hidden size {unit.width}; give at most {unit.width}"
            )
        if spec.router_hidden > unit.width:
            raise InputError(
                f"router.hidden is {spec.router_hidden}, but {unit.name} has hidden size {unit.width}; give at most "
                f"{unit.width}"
            )
    policy = policy_named(spec.policy)
    control = RoutingControl(capacity=1 - spec.sparsity if policy.capacity else None)
    seeds = {unit.name: spec.seed * 100_003 + index for index, unit in enumerate(match.units)}

    def forecaster(unit: Unit) -> nn.Module:
        return make_forecaster(policy, unit.width, spec.rank_of(unit), spec.forecaster).to(device, captured.dtype)

    def router(unit: Unit) -> nn.Module:
        if spec.reads == "bottleneck" and policy.learns:
            beside = captured.graph.get_submodule(f"{unit.name}_forecaster")
            hidden = spec.router_hidden or max(8, unit.width // 4)
            return BottleneckRouter(cast(Forecaster, beside), hidden).to(device, captured.dtype)
        made = make_router(policy, unit.width, spec.rank, spec.router_hidden, spec.sparsity, seeds[unit.name])
        return made.to(device, captured.dtype)

    passes = PassManager(
        [
            InsertForecasters(forecaster, lambda unit: Mux(unit.name, control)),
            InsertRouters(router, _source(spec, policy)),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        passes.run(captured.graph)
    return _ready(RoutedForCausalLM(captured, match, control, spec, base))


def default_spec(width: int) -> RoutingSpec:
    """Return what is inserted by default into a model of a hidden size."""
    return RoutingSpec(default_rank(width), ffn_rank=default_ffn_rank(width), router_hidden=TAUGHT_HIDDEN)


def set_share(model: RoutedForCausalLM, share: float) -> None:
    """Set the share of tokens that every unit skips, where the policy fixes it by structure (`mod`, `random`)."""
    assert model.spec is not None
    model.spec = replace(model.spec, sparsity=share)
    if model.control.capacity is not None:
        model.control.capacity = 1 - share
    for unit in model.units:
        router = model.part(unit, "router")
        if isinstance(router, RandomRouter):
            router.sparsity = share


def _refuse_without_units(match: MatchResult, base: BaseModel) -> None:
    if not match.units:
        near = f" ({match.refusals[0].name}: {match.refusals[0].reason})" if match.refusals else ""
        raise InputError(
            f"{base.name}: {base.config.model_type} has no attention or FFN unit that can be routed{near}; "
            f"convert {SUPPORTED}"
        )


def _source(spec: RoutingSpec, policy: Policy) -> Reads:
    if spec.reads == "bottleneck":  # the router itself takes the bottleneck from there
        return "unit"
    return cast(Reads, spec.reads) if spec.reads else policy.reads


def _ready(model: RoutedForCausalLM) -> RoutedForCausalLM:
    model.train(False)
    return model


def _captured(base: BaseModel, dtype: str, device: str, as_stored: bool) -> Captured:
    weights = base.weights()
    base.check_sizes(weights)
    captured = capture(base.config, base.dtype(dtype))
    if as_stored:
        captured = replace(captured, stored=StoredWeights())
    assign_weights(captured, weights, device)
    PassManager([SplitFusedLinears()]).run(captured.graph)
    return captured
