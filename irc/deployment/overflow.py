"""Warns before an export in fp16 whose activations come near the largest number that fp16 holds."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from irc.bundle.contents import bundle_of
from irc.errors import InputError
from irc.model.routed import RoutedForCausalLM
from irc.text.source import load_text, token_stream

log = logging.getLogger(__name__)

LARGEST = float(torch.finfo(torch.float16).max)
_NEAR = 0.25
_TOKENS = 128
_OWN_TEXT = "stdlib"


def warn_of_overflow(model: RoutedForCausalLM) -> None:
    """Run a model in fp16 on a little text, and warn if an activation is near the end of fp16's range or beyond it.

    The text is the calibration text of the bundle where it is still on this machine, and otherwise Python's standard
    library.
    Models of other data types are not run.
    """
    if model.dtype != torch.float16:
        return
    text, ids = _sample(model)
    largest, where = largest_activation(model, ids)
    if largest >= _NEAR * LARGEST:
        found = f"{largest:,.0f}" if math.isfinite(largest) else "infinite"
        log.warning(
            "fp16 holds numbers up to %s; on %d tokens of %s the largest activation is %s (%s), so that other text may "
            "overflow; export in bf16 or fp32",
            f"{LARGEST:,.0f}",
            ids.numel(),
            text,
            found,
            where,
        )


def _sample(model: RoutedForCausalLM) -> tuple[str, torch.Tensor]:
    """Return the name of a text and its first tokens, int64 [1, tokens]."""
    bundle = bundle_of(model)
    named = None if bundle is None else bundle.config.measured.text.name
    if named and not named.startswith("hf:"):  # that would ask the network, which only the user may
        try:
            ids = _first_tokens(model, named)
        except InputError:
            pass  # the text is not there any more, or no longer one
        else:
            if ids.numel():
                return named, ids
    return _OWN_TEXT, _first_tokens(model, _OWN_TEXT)


def _first_tokens(model: RoutedForCausalLM, text: str) -> torch.Tensor:
    tokenizer: Any = model.base.tokenizer
    context = getattr(model.config, "max_position_embeddings", None) or _TOKENS
    return token_stream(load_text(text).split("calibration")[:8], tokenizer)[None, : min(_TOKENS, context)]


@torch.no_grad()
def largest_activation(model: RoutedForCausalLM, ids: torch.Tensor) -> tuple[float, str]:
    """Return the largest absolute value that goes into a module or comes out of one, and the module's name.

    Args:
        model: Any; both branches of a routed unit are looked at.
        ids: int64 [1, tokens].

    Returns:
        Infinity where a value is infinite or NaN.
    """
    largest, where = 0.0, ""

    def look(name: str, values: Any) -> None:
        nonlocal largest, where
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                found = value.abs().max().item()
                found = math.inf if math.isnan(found) else found
                if found > largest:
                    largest, where = found, name

    hooks = []
    for name, module in model.graph.named_modules():
        if name:
            hooks.append(module.register_forward_hook(lambda _, given, made, name=name: look(name, (*given, made))))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return largest, where
