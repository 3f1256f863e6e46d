"""Writes the real device into graphs that were captured on another device, usually `meta`."""

from __future__ import annotations

import torch
from torch import fx

from passes.base import Pass, PassResult, finish, graph_of


class SetDevice(Pass):
    """Replaces every device argument (of `arange`, `to`, ...) by one device.

    Args:
        device: Where the model will run.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def call(self, model: fx.GraphModule) -> PassResult:
        """Rewrite the device arguments of every graph of the model."""
        modified = False
        for module in model.modules():
            graph = graph_of(module)
            rewritten = [self._rewrite(node) for node in graph.nodes] if graph is not None else []
            if any(rewritten):
                finish(module)
                modified = True
        return PassResult(model, modified)

    def _rewrite(self, node: fx.Node) -> bool:
        args = tuple(self.device if isinstance(value, torch.device) else value for value in node.args)
        kwargs = {key: self.device if isinstance(value, torch.device) else value for key, value in node.kwargs.items()}
        if args == node.args and kwargs == node.kwargs:
            return False
        node.args, node.kwargs = args, kwargs
        return True
