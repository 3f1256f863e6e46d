"""Policy `static`: drops whole units, the least important first (ShortGPT, arXiv 2403.03853, applied to units).

The importance of a unit is one minus the mean cosine between the residual stream before and after the unit adds its
output. A unit that does not turn the stream can be dropped. Importance is measured once, on the dense model and the
calibration text.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from irc.model.policies import StaticRouter
from irc.model.routed import RoutedForCausalLM

_BATCH = 16


def drop_units(model: RoutedForCausalLM, text: torch.Tensor, sparsity: float) -> dict[str, Any]:
    """Drop the least important share of a model's units.

    Args:
        model: Rewritten under policy `static`; its routers are changed in place.
        text: Calibration windows, int64 [windows, length].
        sparsity: Share of units to drop, rounded to whole units.

    Returns:
        `importance` by unit, `calibration_sparsity` (the realized share), and `calibration_keep`, 0 or 1 by unit.
    """
    importance = unit_importance(model, text)
    count = round(sparsity * len(importance))
    dropped = set(sorted(importance, key=importance.__getitem__)[:count])
    for unit in model.units:
        router = model.part(unit, "router")
        assert isinstance(router, StaticRouter)
        router.choose(unit.name not in dropped)
    return {
        "importance": importance,
        "calibration_sparsity": count / len(importance),
        "calibration_keep": {unit.name: float(unit.name not in dropped) for unit in model.units},
    }


@torch.no_grad()
def unit_importance(model: RoutedForCausalLM, text: torch.Tensor) -> dict[str, float]:
    """Return one minus the mean cosine of the residual stream before and after each unit, with every unit executed.

    Args:
        model: Rewritten under policy `static`, so that its routers read the residual stream.
        text: int64 [windows, length].
    """
    streams: dict[str, torch.Tensor] = {}
    totals = {unit.name: 0.0 for unit in model.units}
    handles = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            streams[name] = arguments[0]

        return hook

    def measure(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            stream, y = streams.pop(name).float(), arguments[0].float()
            totals[name] += (1 - F.cosine_similarity(stream, stream + y, dim=-1)).double().sum().item()

        return hook

    for unit in model.units:
        handles.append(model.part(unit, "router").register_forward_pre_hook(remember(unit.name)))
        handles.append(model.part(unit, "mux").register_forward_pre_hook(measure(unit.name)))
    try:
        with model.control.using(mode="execute"):
            for batch in text.split(_BATCH):
                model.states(batch.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / text.numel() for name, total in totals.items()}
