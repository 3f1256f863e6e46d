"""AdamW on float32 copies of 16-bit parameters: steps smaller than their spacing add up and are not rounded away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class MasterAdamW(torch.optim.AdamW):
    """AdamW that keeps float32 weights of its own for parameters of 16 bits; others it updates as AdamW does.

    `take_gradients` moves gradients to these weights, where they can be averaged and clipped; `step` does it otherwise.

    Args:
        groups: `params`, a list, and `lr` of each group.
        weight_decay: Of all groups.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], weight_decay: float) -> None:
        self._masters: dict[nn.Parameter, Tensor] = {}
        super().__init__(list(groups), weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as AdamW does."""
        super().add_param_group({**param_group, "params": [self._own(each) for each in param_group["params"]]})

    def _own(self, parameter: nn.Parameter) -> Tensor:
        if parameter.dtype not in (torch.float16, torch.bfloat16):
            return parameter
        if parameter not in self._masters:
            self._masters[parameter] = parameter.detach().float()
        return self._masters[parameter]

    def master(self, parameter: nn.Parameter) -> Tensor:
        """Return the tensor that is updated for a parameter: a float32 copy, or the parameter itself."""
        return self._masters.get(parameter, parameter)

    @torch.no_grad()
    def set_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Set a parameter and its copy, from a weight of either precision."""
        parameter.copy_(weight)
        if parameter in self._masters:
            self._masters[parameter].copy_(weight)

    def take_gradients(self) -> None:
        """Move the gradients of 16-bit parameters to their copies, in float32."""
        for parameter, master in self._masters.items():
            if parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the copies, then round them into the parameters.

        Raises:
            RuntimeError: There is a closure.
        """
        if closure is not None:
            raise RuntimeError("MasterAdamW.step takes no closure; compute gradients before it")
        self.take_gradients()
        super().step()
        for parameter, master in self._masters.items():
            parameter.copy_(master)
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, the parameters' too."""
        super().zero_grad(set_to_none)
        for parameter in self._masters:
            parameter.grad = None
