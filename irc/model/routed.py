"""The rewritten model as a Hugging Face model: forward, loss, cache and generation over the captured graph."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from irc.errors import InputError
from irc.model.architectures import SUPPORTED
from irc.model.cache import CACHE_NAME, flat_past, updated
from irc.model.capture import Captured, assign_weights, capture
from irc.model.checkpoint import BaseModel
from irc.model.head import split_head
from irc.model.modules import BottleneckRouter, Forecaster, Mux, RoutingControl
from irc.model.policies import Policy, make_forecaster, make_router, policy_named, refuse_whole_sequences
from passes.base import PassManager
from passes.insert_forecasters import InsertForecasters
from passes.insert_routers import InsertRouters, Reads
from passes.match import MatchResult, Unit, match_units
from passes.split_fused_linears import SplitFusedLinears

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoutingSpec:
    """The shape of what is inserted.

    Attributes:
        rank: Bottleneck of the forecasters.
        forecaster: `linear` or `silu`.
        policy: Name of the routing policy (see `irc.model.policies`).
        sparsity: Target share of skipped tokens, where the policy fixes it by structure (`mod`, `random`).
        seed: Of the draws of policy `random`.
        reads: What routers read, as in `passes.insert_routers`; empty for what the policy says.
    """

    rank: int
    forecaster: str = "linear"
    policy: str = "informed"
    sparsity: float = 0.0
    seed: int = 0
    reads: str = ""


class RoutedForCausalLM(PreTrainedModel, GenerationMixin):
    """A captured causal language model, rewritten or not, that transformers' own generation drives.

    Attributes:
        graph: The captured model (see `irc.model.capture.Captured`).
        match: Its units as they were matched in the original graph, and the refusals.
        control: How all muxes decide; mode `route` (deterministic argmax) unless training says otherwise.
        spec: What was inserted, None for a plain model.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self, captured: Captured, match: MatchResult, control: RoutingControl, spec: RoutingSpec | None
    ) -> None:
        super().__init__(captured.config)
        self.graph = captured.graph
        self.match = match
        self.control = control
        self.spec = spec
        self.facts: dict[str, Any] = {}
        # In a tuple: no submodules, so that no parameter has two names.
        self._apart: tuple[fx.GraphModule, fx.GraphModule | None] | None = None
        self.generation_config = GenerationConfig.from_model_config(captured.config)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units, in the order in which a token meets them."""
        return self.match.units

    def part(self, unit: Unit, role: str) -> nn.Module:
        """Return a unit's `forecaster`, `router` or `mux`."""
        return self.graph.get_submodule(f"{unit.name}_{role}")

    def adapter_parameters(self, *roles: str) -> dict[str, nn.Parameter]:
        """Return the parameters of all forecasters and/or routers by their names in the bundle."""
        return {
            f"{unit.name}_{role}.{name}": parameter
            for unit in self.units
            for role in roles
            for name, parameter in self.part(unit, role).named_parameters()
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Compute next-token logits.

        Args:
            input_ids: int64 [batch, tokens].
            attention_mask: [batch, past + tokens], 0 on padding; all ones when None.
            position_ids: int64 [batch, tokens]; counted from the mask when None.
            past_key_values: Cache of earlier tokens; updated and returned.
            labels: int64 [batch, tokens], -100 where no loss counts; shifted inside.
            use_cache: Whether to return the cache; True when None and not training.
            cache: The name of `past_key_values` since transformers 5.24.
            **ignored: Options of transformers' generation that mean nothing here.

        Returns:
            Logits [batch, tokens, vocabulary], the loss when labels are given, the cache.
        """
        cache = past_key_values if cache is None else cache
        logits, *present = self.graph(*self.graph_inputs(input_ids, attention_mask, position_ids, cache))
        if use_cache is None:
            use_cache = not self.training
        kept: dict[str, Any] = {CACHE_NAME: updated(cache, present) if use_cache else None}
        loss = None
        if labels is not None:
            flat = logits[:, :-1].float().flatten(0, 1)
            loss = F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **kept)

    def graph_inputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> list[torch.Tensor]:
        """Return what the graph takes, from the arguments of `forward`; tells the control what is padding."""
        batch, tokens = input_ids.shape
        if self.control.capacity is not None:
            self.control.real = None if attention_mask is None else attention_mask[:, -tokens:].bool()
        past = flat_past(self.config, cache, batch, self.dtype, input_ids.device)
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, past[0].shape[2] + tokens)
        if position_ids is None:
            position_ids = positions(attention_mask)[:, -tokens:]
        return [input_ids, attention_mask, position_ids, *past]

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the head reads, [batch, tokens, d], without computing logits; arguments as of `forward`."""
        states: torch.Tensor = self._parts()[0](*self.graph_inputs(input_ids, attention_mask))
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., vocabulary] of what the head reads [..., d]."""
        head = self._parts()[1]
        return states if head is None else cast(torch.Tensor, head(states))

    def _parts(self) -> tuple[fx.GraphModule, fx.GraphModule | None]:
        if self._apart is None:
            self._apart = split_head(self.graph)
        return self._apart

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue text, by transformers' own generation.

        Raises:
            InputError: The policy's routes depend on tokens that are not there yet.
        """
        if self.spec is not None:
            refuse_whole_sequences(policy_named(self.spec.policy), "generate text")
        return super().generate(*args, **kwargs)

    def save_pretrained(self, save_directory: str | PathLike[Any], *args: Any, **kwargs: Any) -> None:
        """Save as a bundle (see `irc.bundle.save_bundle`)."""
        from irc.bundle import save_bundle

        save_bundle(self, Path(save_directory))


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count positions from an attention mask [batch, length]: padding takes none; int64, same shape."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def build_plain(base: BaseModel, dtype: str = "auto", device: str = "cpu") -> RoutedForCausalLM:
    """Capture a base model without inserting anything."""
    captured = _captured(base, dtype, device)
    return _ready(RoutedForCausalLM(captured, match_units(captured.graph), RoutingControl(), None))


def build_routed(
    base: BaseModel, spec: RoutingSpec, dtype: str = "auto", device: str = "cpu", seed: int = 0
) -> RoutedForCausalLM:
    """Capture a base model and insert untrained forecasters, routers and muxes round every unit.

    Args:
        base: Model on disk.
        spec: What to insert.
        dtype: `auto` (fp32, for checkpoints of over 2 GB bf16), `fp32`, `fp16` or `bf16`.
        device: Where it will run.
        seed: Of the inserted modules' initial weights.
    """
    captured = _captured(base, dtype, device)
    match = match_units(captured.graph)
    _refuse_without_units(match, base)
    if match.refusals:
        first = match.refusals[0]
        log.warning("%d submodules are not routed; the first: %s: %s", len(match.refusals), first.name, first.reason)
    for unit in match.units:
        if spec.rank > unit.width:
            raise InputError(
                f"rank is {spec.rank}, {unit.name} has hidden size {unit.width}; give a rank of at most {unit.width}"
            )
    policy = policy_named(spec.policy)
    control = RoutingControl(capacity=1 - spec.sparsity if policy.capacity else None)
    seeds = {unit.name: spec.seed * 100_003 + index for index, unit in enumerate(match.units)}

    def forecaster(unit: Unit) -> nn.Module:
        return make_forecaster(policy, unit.width, spec.rank, spec.forecaster).to(device, captured.dtype)

    def router(unit: Unit) -> nn.Module:
        if spec.reads == "bottleneck" and policy.learns:
            beside = captured.graph.get_submodule(f"{unit.name}_forecaster")
            return BottleneckRouter(cast(Forecaster, beside), max(8, unit.width // 4)).to(device, captured.dtype)
        made = make_router(policy, unit.width, spec.rank, spec.sparsity, seeds[unit.name])
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
    return _ready(RoutedForCausalLM(captured, match, control, spec))


def _refuse_without_units(match: MatchResult, base: BaseModel) -> None:
    if not match.units:
        near = f" ({match.refusals[0].name}: {match.refusals[0].reason})" if match.refusals else ""
        raise InputError(
            f"{base.name}: {base.config.model_type} has no attention or FFN unit that can be routed{near}; "
            f"convert {SUPPORTED}"
        )


def _source(spec: RoutingSpec, policy: Policy) -> Reads:
    if spec.reads == "bottleneck":  # its own router takes it from there
        return "unit"
    return cast(Reads, spec.reads) if spec.reads else policy.reads


def _ready(model: RoutedForCausalLM) -> RoutedForCausalLM:
    model.train(False)
    return model


def _captured(base: BaseModel, dtype: str, device: str) -> Captured:
    weights = base.weights()
    base.check_sizes(weights)
    captured = capture(base.config, base.dtype(dtype))
    assign_weights(captured, weights, device)
    PassManager([SplitFusedLinears()]).run(captured.graph)
    return captured
