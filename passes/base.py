"""Pass, PassManager and PassError: how a rewrite of a captured model runs and is checked.

Passes work on the `torch.fx.GraphModule` that capture makes. Its submodules with a graph of their own are
`torch.export.unflatten.InterpreterModule`s; its leaves are real `nn.Module`s.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import fx, nn

from passes.printer import print_model, unified_diff
from passes.verifier import verify_model

log = logging.getLogger(__name__)


class PassError(Exception):
    """A pass could not do its work, or left an invalid graph.

    Args:
        where: Path of the module (and node) in the model.
        expected: What the pass needed or promised.
        remedy: What the user can do.
    """

    def __init__(self, where: str, expected: str, remedy: str) -> None:
        super().__init__(f"{where}: {expected}; {remedy}")
        self.where = where
        self.expected = expected
        self.remedy = remedy


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        model: The model, changed in place or new.
        modified: Whether anything changed; a second run of the same pass must say False.
    """

    model: fx.GraphModule
    modified: bool


class Pass(ABC):
    """One rewrite of a captured model; subclasses implement `call`."""

    @property
    def name(self) -> str:
        """The class name, as shown in failures and dumps."""
        return type(self).__name__

    def requires(self, model: fx.GraphModule) -> None:
        """Raise `PassError` when the input is not what the pass can work on."""
        return None

    @abstractmethod
    def call(self, model: fx.GraphModule) -> PassResult:
        """Rewrite the model and say whether anything changed."""

    def ensures(self, model: fx.GraphModule) -> None:
        """Raise `PassError` when the result, not the input, breaks what the pass guarantees."""
        return None


@dataclass
class PassManager:
    """Runs passes in order, verifies the graph after each, and dumps what each one changed.

    Attributes:
        passes: The passes, in order.
        dump_dir: Folder for `NN-Name.before.txt`, `.after.txt` and `.diff`; None writes no files.
        history: Names of the passes that have run.
    """

    passes: Sequence[Pass]
    dump_dir: Path | None = None
    history: list[str] = field(default_factory=list)

    def run(self, model: fx.GraphModule) -> PassResult:
        """Run all passes.

        Raises:
            PassError: A pass failed; the message names it and those that ran before it.
        """
        modified = False
        for index, step in enumerate(self.passes):
            before = print_model(model) if self.dump_dir else ""
            try:
                step.requires(model)
                result = step.call(model)
                step.ensures(result.model)
                for problem in verify_model(result.model):
                    raise PassError(problem.where, problem.message, "this is a bug in the pass: please report it")
            except PassError as error:
                ran = ", ".join(self.history) or "none"
                remedy = f"{error.remedy} (ran before: {ran})"
                raise PassError(error.where, f"{step.name} failed: {error.expected}", remedy) from error
            model = result.model
            modified |= result.modified
            self.history.append(step.name)
            log.debug("%s %s", step.name, "changed the graph" if result.modified else "changed nothing")
            if self.dump_dir:
                self._dump(index, step.name, before, print_model(model))
        return PassResult(model, modified)

    def _dump(self, index: int, name: str, before: str, after: str) -> None:
        assert self.dump_dir is not None
        self.dump_dir.mkdir(parents=True, exist_ok=True)
        stem = self.dump_dir / f"{index:02d}-{name}"
        stem.with_suffix(".before.txt").write_text(before)
        stem.with_suffix(".after.txt").write_text(after)
        stem.with_suffix(".diff").write_text(unified_diff(before, after))


def graph_of(module: nn.Module) -> fx.Graph | None:
    """Return the graph of a captured submodule, None for a leaf."""
    graph = getattr(module, "graph", None)
    return graph if isinstance(graph, fx.Graph) else None


def finish(module: nn.Module) -> None:
    """Lint a changed graph and make the module run it."""
    if isinstance(module, fx.GraphModule):
        module.graph.lint()
        module.recompile()
    else:
        cast("_Finalizable", module).finalize()


def rewrite_nodes(
    model: fx.GraphModule, target: object, rewrite: Callable[[fx.Graph, nn.Module, fx.Node], bool]
) -> PassResult:
    """Apply a function to every node that calls `target`, in every graph; it returns whether it changed the node."""
    modified = False
    for module in list(model.modules()):
        graph = graph_of(module)
        if graph is None:
            continue
        found = [node for node in graph.nodes if node.target == target]
        changed = [rewrite(graph, module, node) for node in found]
        if any(changed):
            finish(module)
            modified = True
    return PassResult(model, modified)


def transposed_weight(graph: fx.Graph, linear: str) -> fx.Node:
    """Insert the weight of a linear, by its path, as [in, out]."""
    return graph.call_function(torch.ops.aten.t.default, (graph.get_attr(f"{linear}.weight"),))


class _Finalizable:
    def finalize(self) -> None: ...
