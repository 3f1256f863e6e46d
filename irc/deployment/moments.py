"""Second moments of what a model's products read, on calibration text: what rounding by GPTQ needs."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import nn

from irc.bundle.contents import bundle_of
from irc.errors import InputError
from irc.model.routed import RoutedForCausalLM
from irc.text.mixture import load_texts
from irc.text.source import OWN_TEXT, pick, windows

_TOKENS = 8192
_WINDOW = 512


class Moments:
    """Second moments of the inputs of a model's linears, gathered while every unit executes.

    Each token's input counts with its direction alone. A few tokens have inputs that are hundreds of times larger
    (massive activations, arXiv 2402.17762), and rounding would otherwise be fitted to these.

    Attributes:
        text: Name of the text.
        tokens: How many were read.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = 0
        self._sums: dict[int, torch.Tensor] = {}
        self._same: dict[int, int] = {}  # linears that read one input have one sum
        self._last: tuple[torch.Tensor | None, int] = (None, 0)

    def of(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return the moments of a linear's inputs, float32 [in, in]; None for other weights, and if it read nothing."""
        key = weight.data_ptr()
        found = self._sums.get(self._same.get(key, key))
        return None if found is None or not found.any() else found

    def _add(self, linear: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        key, x = linear.weight.data_ptr(), inputs[0]
        if x is self._last[0]:
            self._same[key] = self._last[1]
            return
        self._last = x, key
        rows = x.detach().flatten(0, -2).float()
        rows = rows[rows.isfinite().all(-1)]  # fp16 may overflow, of which the export warns
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        product = rows.T @ rows
        if key in self._sums:
            self._sums[key] += product
        else:
            self._sums[key] = product


@torch.no_grad()
def gather_moments(model: RoutedForCausalLM) -> Moments:
    """Read the calibration text of the conversion, without what the model wrote itself; if nothing is left, `stdlib`.

    Texts from the hub are left out too: a bundle must not decide what is downloaded.

    Args:
        model: Whose inputs are gathered.

    Raises:
        InputError: The text is not there any more, or too short.
    """
    bundle = bundle_of(model)
    named = zip(bundle.recipe.data, bundle.recipe.data_weights or repeat(1.0), strict=False) if bundle else ()
    local = {text: weight for text, weight in named if weight and text != OWN_TEXT and not text.startswith("hf:")}
    try:
        texts = load_texts(list(local), list(local.values())) if local else load_texts(["stdlib"])
    except InputError as error:
        why = f"rounding by gptq reads the text of the conversion: {error}; or use rounding nearest"
        raise InputError(why, options=("rounding",)) from error
    longest = getattr(model.config, "max_position_embeddings", None) or _WINDOW
    window = min(_WINDOW, longest, (bundle.recipe.seq_len if bundle else None) or _WINDOW)
    stream = texts.stream("calibration", model.base.tokenizer, window, 0)
    ids = pick(windows(stream, window, "calibration"), _TOKENS)
    found = Moments(texts.name)
    linears = [(name, module) for name, module in model.graph.named_modules() if isinstance(module, nn.Linear)]
    inserted = ("_router.", "_forecaster.")
    hooks = [
        module.register_forward_pre_hook(found._add)
        for name, module in linears
        if not any(part in f"{name}." for part in inserted)
    ]
    try:
        with model.control.using(mode="execute", tape=None):
            for some in ids.split(1):
                model(input_ids=some, use_cache=False)
                found.tokens += some.numel()
    finally:
        for hook in hooks:
            hook.remove()
        found._last = None, 0
    return found
