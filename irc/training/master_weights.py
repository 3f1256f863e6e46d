"""AdamW with float32 copies of 16-bit parameters, so that steps smaller than their rounding error add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class MasterAdamW(torch.optim.AdamW):
    """AdamW that keeps float32 copies of 16-bit parameters. Other parameters are updated as by AdamW.

    `take_gradients` moves the gradients to the copies, where you can average them. `step` calls it if you did not.

    Args:
        groups: Parameter groups, each with `params`, a list, and `lr`.
        weight_decay: Weight decay of all groups.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], weight_decay: float) -> None:
        self._masters: dict[nn.Parameter, Tensor] = {}
        super().__init__(list(groups), weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters."""
        weights = [self._new_master(parameter) for parameter in param_group["params"]]
        super().add_param_group({**param_group, "params": weights})

    def _new_master(self, parameter: nn.Parameter) -> Tensor:
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
        """Set a parameter and its copy. The weight may have either precision."""
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
        """Update the copies and round them into the parameters.

        Raises:
            RuntimeError: A closure was given.
        """
        if closure is not None:
            raise RuntimeError("MasterAdamW.step does not accept a closure; compute the gradients before you call it")
        self.take_gradients()
        super().step()
        for parameter, master in self._masters.items():
            parameter.copy_(master)
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the copies and of the parameters."""
        super().zero_grad(set_to_none)
        for parameter in self._masters:
            parameter.grad = None
