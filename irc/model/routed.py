"""The captured model in Hugging Face's form: forward, loss, cache and generation."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from irc.errors import InputError
from irc.model import storage
from irc.model.cache import CACHE_NAME, flat_past, updated
from irc.model.capture import Captured
from irc.model.checkpoint import BaseModel
from irc.model.compacted import compacted
from irc.model.head import split_head
from irc.model.modules import RoutingControl
from irc.recipe.key_policy import KeyPolicy
from irc.recipe.policies import policy_named, refuse_whole_sequences
from irc.recipe.stages import LoraRecipe
from passes.base import PassError, PassManager
from passes.match import MatchResult, Unit
from passes.set_device import SetDevice

log = logging.getLogger(__name__)

_REFUSED = ("inputs_embeds", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class RoutingSpec:
    """What is inserted into a model.

    Attributes:
        rank: Rank of the forecasters of attention units.
        ffn_rank: Rank of the forecasters of FFN units; 0 for the same.
        router_hidden: Hidden units of a router; 0 for what the policy's authors have (see `make_router`).
        forecaster: `linear` or `silu`.
        policy: Name of the routing policy (see `irc.recipe.policies`).
        sparsity: Target share of skipped tokens, if the policy fixes it by structure (`mod`, `random`).
        seed: Seed of the draws of policy `random`.
        reads: What routers read, as in `passes.insert_routers`; empty for the policy's default.
    """

    rank: int
    forecaster: str = "linear"
    policy: str = "informed"
    sparsity: float = 0.0
    seed: int = 0
    reads: str = ""
    ffn_rank: int = 0
    router_hidden: int = 0

    def rank_of(self, unit: Unit) -> int:
        """Return the rank of a unit's forecaster."""
        return self.ffn_rank or self.rank if unit.kind == "ffn" else self.rank


class RoutedForCausalLM(PreTrainedModel, GenerationMixin):
    """A captured causal language model, plain or with routers; transformers' own generation runs it.

    Attributes:
        graph: The captured model (see `irc.model.capture.Captured`).
        match: Units that were found in the original graph, and rejected submodules.
        control: How all muxes decide: mode `route` (deterministic argmax), unless training sets another.
        spec: What was inserted; None for a plain model.
        base: The model on disk that was captured.
        stored: What its placeholders stand for, if it has any; it can then be exported, but not run.
        lora: Settings of its LoRA adapters; None without adapters.
        key_policy: Which keys and values are stored.
        sharded: Whether the weights of its layers are gathered by hooks on them (FSDP).
        bundle: What is known of the bundle that the model was loaded from; None otherwise. Read it with
            `irc.bundle.contents.bundle_of`.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self,
        captured: Captured,
        match: MatchResult,
        control: RoutingControl,
        spec: RoutingSpec | None,
        base: BaseModel,
    ) -> None:
        super().__init__(captured.config)
        self.base = base
        self.graph = captured.graph
        self.match = match
        self.control = control
        self.spec = spec
        self.stored = captured.stored
        self.lora: LoraRecipe | None = None
        self.key_policy = KeyPolicy()
        self.sharded = False
        self.bundle: object | None = None
        # In a dictionary, which makes them no submodules, so that no parameter has two names.
        self._compacted: dict[tuple[nn.Module, ...], fx.GraphModule] = {}
        self._split: dict[tuple[Any, ...], tuple[fx.GraphModule, fx.GraphModule | None]] = {}
        self.generation_config = copy.deepcopy(base.generation)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units, in the order in which a token passes through them."""
        return self.match.units

    def part(self, unit: Unit, role: str) -> nn.Module:
        """Return a unit's `forecaster`, `router` or `mux`."""
        return self.graph.get_submodule(f"{unit.name}_{role}")

    def adapter_parameters(self, *roles: str) -> dict[str, nn.Parameter]:
        """Return the parameters of all `forecaster` and `router` parts with these roles, named as in the bundle."""
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
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute next-token logits.

        Args:
            input_ids: int64 [batch, tokens].
            attention_mask: [batch, past + tokens], 0 on padding; None for all ones.
            position_ids: int64 [batch, tokens]; None to count them from the mask.
            past_key_values: Cache of earlier tokens; updated and returned.
            labels: int64 [batch, tokens], -100 for tokens without loss; shifted here.
            use_cache: Whether to return the cache; None for True unless training.
            logits_to_keep: Compute logits of the last N tokens only, or of the tokens at these indices [kept]; 0 for
                all.
            return_dict: False for a plain tuple.
            cache: The name of `past_key_values` since transformers 5.24.
            **others: `num_items_in_batch`, by which transformers' Trainer divides the summed loss when it accumulates
                gradients; other options of transformers have no meaning here.

        Returns:
            Logits [batch, tokens or kept, vocabulary], the loss over all tokens if labels are given, and the cache.

        Raises:
            InputError: An input has the wrong shape, or the graph does not provide what is asked for: embeddings as
                input, hidden states or attention weights as output.
        """
        self._refuse(others)
        cache = past_key_values if cache is None else cache
        inputs = self.graph_inputs(input_ids, attention_mask, position_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is None and (isinstance(logits_to_keep, torch.Tensor) or logits_to_keep > 0):
            states, *present = self._parts(with_cache=True)[0](*inputs)
            logits = self.logits(states[:, kept])
        else:
            logits, *present = (self._compact_graph() if self._compacts() else self.graph)(*inputs)
        if use_cache is None:
            use_cache = not self.training
        returned: dict[str, Any] = {CACHE_NAME: updated(cache, present) if use_cache else None}
        loss = None
        if labels is not None:
            flat = logits[:, :-1].float().flatten(0, 1)
            loss = _mean_loss(flat, labels[:, 1:].flatten(), others.get("num_items_in_batch"))
            logits = logits[:, kept]
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **returned)
        return output.to_tuple() if return_dict is False else output

    def graph_inputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> list[torch.Tensor]:
        """Return the inputs of the graph for arguments of `forward`, and tell the control which tokens are padding.

        Raises:
            InputError: An argument has the wrong shape, or an id is outside of the vocabulary.
        """
        if input_ids.ndim != 2 or 0 in input_ids.shape or input_ids.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"input_ids is {str(input_ids.dtype).removeprefix('torch.')} {list(input_ids.shape)}; give int64 "
                "[batch, tokens] with at least one token"
            )
        self._check_ids(input_ids)
        batch, tokens = input_ids.shape
        if self.control.capacity is not None:
            self.control.real = None if attention_mask is None else attention_mask[:, -tokens:].bool()
        past = flat_past(self.config, cache, batch, self.dtype, input_ids.device)
        length = past[0].shape[2] + tokens
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, length)
        _check_shape("attention_mask", attention_mask, batch, length)
        if position_ids is None:
            position_ids = positions(attention_mask)[:, -tokens:]
        if position_ids.shape == (1, tokens):
            position_ids = position_ids.expand(batch, tokens)
        _check_shape("position_ids", position_ids, batch, tokens)
        return [input_ids, attention_mask, position_ids, *past]

    def _check_ids(self, ids: torch.Tensor) -> None:
        """Refuse ids for which the embedding has no row, such as those of tokens that the tokenizer alone knows."""
        smallest, largest = (0, 0) if ids.is_meta else (int(value) for value in ids.aminmax())
        if smallest < 0 or largest >= self.config.vocab_size:
            raise InputError(
                f"input_ids hold {smallest if smallest < 0 else largest}, but the ids of {self.base.name} are 0 to "
                f"{self.config.vocab_size - 1}; if its tokenizer has more tokens, leave them out of the text"
            )

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the hidden states that the head reads, [batch, tokens, d]; arguments as in `forward`."""
        states: torch.Tensor = self._parts()[0](*self.graph_inputs(input_ids, attention_mask))
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., vocabulary] of hidden states that the head reads [..., d]."""
        head = self._parts()[1]
        return states if head is None else cast(torch.Tensor, head(states))

    def _parts(self, with_cache: bool = False) -> tuple[fx.GraphModule, fx.GraphModule | None]:
        key = (with_cache, self._compacts(), *self.graph.children())  # peft replaces the head by another module
        if key not in self._split:
            graph = self._compact_graph() if self._compacts() else self.graph
            self._split[key] = split_head(graph, with_cache=with_cache)
        return self._split[key]

    def _compacts(self) -> bool:
        """Whether each token takes one branch only now. Training and measuring errors need both."""
        control = self.control
        routed = self.spec is not None and control.mode in ("route", "forced")
        return routed and not (control.measure_error or torch.is_grad_enabled() or self.sharded)

    def _compact_graph(self) -> fx.GraphModule:
        key = tuple(self.graph.children())
        if key not in self._compacted:
            try:
                self._compacted = {key: compacted(self.graph, self.control)}
            except PassError as error:
                log.warning("each token computes both branches of every unit: %s", error)
                self._compacted = {key: self.graph}
        return self._compacted[key]

    def rewritten(self) -> None:
        """Tell the model that modules or graphs in `graph` were replaced: parts made from them are made anew."""
        self._compacted.clear()
        self._split.clear()

    def _refuse(self, options: dict[str, Any]) -> None:
        for name in _REFUSED:
            if options.get(name) is not None and options[name] is not False:
                raise InputError(f"{name} is not in the captured graph; leave it out, or use the base model")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue text with transformers' own generation.

        Raises:
            InputError: The policy's routes depend on later tokens, or the graph does not provide what is asked for (see
                `forward`).
        """
        self._refuse(kwargs)
        if self.spec is not None:
            refuse_whole_sequences(policy_named(self.spec.policy), "generate text")
        return super().generate(*args, **kwargs)

    def save_pretrained(self, save_directory: str | PathLike[Any], *args: Any, **kwargs: Any) -> None:
        """Save as a bundle (see `irc.bundle.saving.save_bundle`).

        Args:
            save_directory: Folder to write.
            *args: Ignored; transformers takes more.
            **kwargs: Ignored, except `push_to_hub`.

        Raises:
            InputError: `push_to_hub` is set; upload the folder after you have saved it.
        """
        if kwargs.get("push_to_hub"):
            raise InputError("push_to_hub is not supported; save to a folder, then run `hf upload NAME FOLDER`")
        storage.storage().save(self, Path(save_directory))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> RoutedForCausalLM:
        """Load a bundle: `irc.load`, with its arguments."""
        return cast(RoutedForCausalLM, storage.storage().load(*args, **kwargs))

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding, which maps token ids [batch, tokens] to [batch, tokens, d]."""
        return self.graph.get_submodule("model.embed_tokens")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refuse to resize: a bundle belongs to its base, whose vocabulary it shares.

        Raises:
            InputError: Always.
        """
        raise InputError("a routed model has the vocabulary of its base; resize the base and convert it again")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RoutedForCausalLM:
        """Move the model and its graphs, which name their device. Their data type is that of the capture."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype:
            raise InputError(
                f"the graph was captured in {str(self.dtype).removeprefix('torch.')} and cannot change; "
                f"load the model with dtype='{str(probe.dtype).removeprefix('torch.')}'"
            )
        moved = probe.device != self.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if moved:
            PassManager([SetDevice(probe.device)]).run(self.graph)
            self.rewritten()
        return self


def _mean_loss(logits: torch.Tensor, labels: torch.Tensor, count: int | torch.Tensor | None) -> torch.Tensor:
    """Return the mean loss of the tokens with a label, or their sum over the count of the batch that they belong to."""
    if count is None:
        return F.cross_entropy(logits, labels, ignore_index=-100)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count


def _check_shape(name: str, tensor: torch.Tensor, batch: int, length: int) -> None:
    if tensor.ndim == 4:
        raise InputError(
            f"{name} has 4 dimensions, as for a cache of fixed size (cache_implementation='static'), which the graph "
            "does not support; leave that out, and give 0 and 1 in [batch, past + tokens]"
        )
    if tensor.shape != (batch, length):
        raise InputError(
            f"{name} is {list(tensor.shape)}, expected {[batch, length]} for these input_ids and this cache"
        )


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count positions from an attention mask [batch, length], skipping padding; int64, same shape."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
