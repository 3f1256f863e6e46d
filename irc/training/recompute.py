"""Activation checkpointing: decoder layers keep their inputs alone and run again in the backward pass."""

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
    """Let a model keep less for the backward pass, which computes every layer a second time.

    A layer is computed again as it was the first time: with the same routing mode, noise and temperature, whatever
    the control says by then. What it records the second time goes nowhere.

    Args:
        model: Rewritten model.
        on: Whether to do so at all.
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
        then = {**vars(control), "tape": None if control.tape is None else {}}
        return contextlib.nullcontext(), control.using(**then)

    def forward(*args: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=True)

    return forward
