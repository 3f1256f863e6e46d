"""Takes out of captured graphs what only the capture needed."""

from __future__ import annotations

import torch
from torch import fx

from passes.base import Pass, PassResult, finish, graph_of

_ASSERTS = frozenset({torch.ops.aten._assert_tensor_metadata.default})


class CleanUp(Pass):
    """Removes metadata assertions: they pin the device and dtype of the capture, and compute nothing."""

    def call(self, model: fx.GraphModule) -> PassResult:
        """Remove the assertions from every graph of the model."""
        modified = False
        for module in model.modules():
            graph = graph_of(module)
            if graph is None:
                continue
            dead = [node for node in graph.nodes if node.target in _ASSERTS and not node.users]
            for node in dead:
                graph.erase_node(node)
            if dead:
                finish(module)
                modified = True
        return PassResult(model, modified)
