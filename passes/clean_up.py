"""Removes from captured graphs what only the capture needed."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from passes.base import Pass, PassResult, finish, graph_of

_ASSERTS = frozenset({torch.ops.aten._assert_tensor_metadata.default})
_DROPOUT = torch.ops.aten.dropout.default


class CleanUp(Pass):
    """Removes metadata assertions, which pin the device and dtype of the capture, and dropouts captured in eval mode.

    Such a dropout returns its input, and would separate a unit's last linear from its output.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Remove both from every graph of the model."""
        modified = False
        for module in model.modules():
            graph = graph_of(module)
            if graph is None:
                continue
            idle = [node for node in graph.nodes if node.target is _DROPOUT and node.args[2] is False]
            for node in idle:
                node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            dead = idle + [node for node in graph.nodes if node.target in _ASSERTS and not node.users]
            for node in dead:
                graph.erase_node(node)
            if dead:
                finish(module)
                modified = True
        return PassResult(model, modified)
