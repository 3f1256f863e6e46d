"""Activation checkpointing: decoder layers keep only their inputs and are computed again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from irc.model.modules import RoutingControl
from irc.model.routed import RoutedForCausalLM


@contextmanager
def recomputing(model: RoutedForCausalLM, on: bool = True) -> Iterator[None]:
    """Compute each layer again in the backward pass instead of keeping its activations, inside a `with` block.

    The second computation uses the routing mode, noise and temperature of the first, even if the model's control has
    changed since. Its records are discarded.

    Args:
        model: Rewritten model.
        on: Whether to do this; False leaves the model as it is.
    """
    blocks = {unit.block: model.graph.get_submodule(unit.block) for unit in model.units} if on else {}
    for block in blocks.values():
        block.__dict__["forward"] = _checkpointed(block, model.control)
    try:
        yield
    finally:
        for block in blocks.values():
            del block.__dict__["forward"]


def _checkpointed(block: nn.Module, control: RoutingControl) -> Callable[..., Any]:
    plain = block.forward

    def contexts() -> tuple[Any, Any]:
        settings_now = {**vars(control), "tape": None if control.tape is None else {}}
        return contextlib.nullcontext(), control.using(**settings_now)

    def forward(*args: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=True)

    return forward
