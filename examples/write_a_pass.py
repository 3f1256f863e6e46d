"""Write your own pass, run it on a captured model, and look at what it changed.

    python examples/write_a_pass.py

The pass replaces every SiLU by a hard swish, which needs no exponential. A pass rewrites the graphs of a captured
model; its methods `requires` and `ensures` check what it needs and what it promises. The manager verifies the graph
after each pass and dumps `NN-Name.before.txt`, `.after.txt` and `.diff`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tiny_llama import model_and_text
from torch import fx, nn

from irc.model.build import build_plain
from irc.model.checkpoint import find_base
from passes.base import Pass, PassError, PassManager, PassResult, graph_of, rewrite_nodes

SILU, HARD_SWISH = torch.ops.aten.silu.default, torch.ops.aten.hardswish.default


def calls(model: fx.GraphModule, target: object) -> int:
    """Count the nodes that call an operator, in all graphs of a model."""
    graphs = filter(None, map(graph_of, model.modules()))
    return sum(node.target == target for graph in graphs for node in graph.nodes)


class ReplaceSilu(Pass):
    """Calls hard swish wherever the model calls SiLU."""

    def call(self, model: fx.GraphModule) -> PassResult:
        def rewrite(graph: fx.Graph, module: nn.Module, node: fx.Node) -> bool:
            node.target = HARD_SWISH
            return True

        return rewrite_nodes(model, SILU, rewrite)

    def ensures(self, model: fx.GraphModule) -> None:
        if calls(model, SILU):
            raise PassError("model", "expected no SiLU to be left", "this is a bug in the pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/own-pass"))
    output = parser.parse_args().output
    folder, text = model_and_text()
    base = find_base(str(folder))
    model = build_plain(base, "fp32")
    ids = torch.tensor([base.tokenizer((text / "heapq.py").read_text()[:100])["input_ids"]])

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids, use_cache=False).loss)

    found, before = calls(model.graph, SILU), loss()
    manager = PassManager([ReplaceSilu()], dump_dir=output / "dump")
    result = manager.run(model.graph)
    again = ReplaceSilu().call(result.model)
    print(f"{found} SiLU before, {calls(result.model, SILU)} after, {calls(result.model, HARD_SWISH)} hard swish")
    print(f"changed: {result.modified}; changed by a second run: {again.modified}")
    print(f"loss {before:.4f} before, {loss():.4f} after")
    print((output / "dump" / "00-ReplaceSilu.diff").read_text()[:600])
    print(f"dumps: {output / 'dump'}")


if __name__ == "__main__":
    main()
