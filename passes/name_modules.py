"""Notes on every node which module it belongs to, so that exported nodes get names that a person can read."""

from __future__ import annotations

import re

from torch import fx

from passes.base import Pass, PassResult, graph_of

MODULE = "irc.module"
"""Key in a node's `meta["custom"]` for the path of its module."""
PART = "part"
"""Key in a node's `meta` for the submodule whose work it does, relative to the module whose graph holds the node."""
_CALL_NUMBER = re.compile(r"@\d+")  # torch.export numbers the graphs of a module that is called more than once


class NameModules(Pass):
    """Writes the path of its module into the `meta["custom"]` of every node, which torch.export passes on.

    A node that calls a submodule gets the submodule's path. So does an operator that an earlier pass put in its place,
    if that pass left the submodule's name in `meta["part"]`.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Note the modules of all nodes."""
        modified = False
        for path, module in model.named_modules():
            graph = graph_of(module)
            for node in graph.nodes if graph is not None else ():
                part = node.meta.get(PART) or (str(node.target) if node.op == "call_module" else "")
                name = _CALL_NUMBER.sub("", f"{path}.{part}".strip("."))
                custom = node.meta.get("custom") or {}
                if custom.get(MODULE) != name:
                    node.meta["custom"] = custom | {MODULE: name}
                    modified = True
        return PassResult(model, modified)
