"""The definition of a valid graph as data: a list of rules, each a name and a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from passes.match import ADDS, is_mux

Check = Callable[[nn.Module, fx.Graph], Iterator[tuple[fx.Node, str]]]


@dataclass(frozen=True)
class Problem:
    """A broken rule, and where."""

    rule: str
    where: str
    message: str


def _targets_exist(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    for node in graph.nodes:
        if node.op == "call_module":
            try:
                module.get_submodule(str(node.target))
            except AttributeError:
                yield node, f"calls the submodule {node.target}, which does not exist"


def _muxes_choose(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    for node in graph.nodes:
        if is_mux(node) and len(node.args) not in (2, 3):
            yield node, f"a mux takes (y, forecast) or (y, forecast, logits), not {len(node.args)} arguments"


def _muxes_lead_to_adds(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    for node in graph.nodes:
        if not is_mux(node):
            continue
        users = list(node.users)
        if len(users) != 1:
            yield node, f"a mux feeds one residual add, not {len(users)} nodes"
        elif users[0].target not in ADDS:
            yield node, f"a mux feeds one residual add, not {getattr(users[0].target, '__name__', users[0].target)}"


def _known_input(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """A router reads what the unit's forecaster reads, or a residual stream of the block."""
    muxes = [node for node in graph.nodes if is_mux(node)]
    adds = {user for mux in muxes for user in mux.users if user.target in ADDS}
    streams = {node for add in adds for node in add.all_input_nodes} - set(muxes)
    for mux in muxes:
        forecast, logits = mux.args[1:3] if len(mux.args) == 3 else (None, None)
        if isinstance(forecast, fx.Node) and isinstance(logits, fx.Node):
            read = logits.args[0] if logits.args else None
            if forecast.args != logits.args and read not in streams:
                yield mux, "its router reads neither what its forecaster reads nor a residual stream"


RULES: tuple[tuple[str, Check], ...] = (
    ("module calls have targets", _targets_exist),
    ("a mux has an output, a forecast and at most one decision", _muxes_choose),
    ("a mux feeds one residual add", _muxes_lead_to_adds),
    ("a router reads the unit's input or a residual stream", _known_input),
)


def verify_model(model: nn.Module) -> list[Problem]:
    """Check every graph of a captured model against all rules and fx's own lint."""
    problems: list[Problem] = []
    for path, module in model.named_modules():
        graph = getattr(module, "graph", None)
        if not isinstance(graph, fx.Graph):
            continue
        where = path or "(root)"
        try:
            graph.lint()
        except RuntimeError as error:
            problems.append(Problem("fx lint", where, str(error)))
        for rule, check in RULES:
            for node, message in check(module, graph):
                problems.append(Problem(rule, f"{where}, node %{node.name}", message))
    return problems
