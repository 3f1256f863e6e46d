"""The graph that skips: each unit runs on the tokens that execute it, its forecaster on the others.

The passes of an export lower a copy of the captured graph. The copy has graphs of its own and shares everything else
with the model: parameters, routers, forecasters, linears with or without adapters. Each operator of the dialect then
becomes a function that does nothing where there is nothing to do, so that one token takes one branch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from irc.model.modules import APPROXIMATE, EXECUTE, Record, RoutingControl, difference_of
from passes.base import PassManager, finish, graph_of
from passes.dialect_attention import append
from passes.lower_units import LowerUnits
from passes.raise_attention import RaiseAttention
from passes.raise_norms import RaiseNorms
from passes.route_experts import RouteExperts

irc = torch.ops.irc


def compacted(graph: fx.GraphModule, control: RoutingControl) -> fx.GraphModule:
    """Return a graph that computes for each token only the branch that it takes; for modes `route` and `forced`.

    It shares the modules of `graph`: make it anew after modules or graphs were replaced.

    Args:
        graph: A rewritten model (see `irc.model.capture.Captured`).
        control: Of its muxes; it decides here too, and gets the same records, without errors of forecasts.

    Raises:
        PassError: A unit has a form that cannot be lowered.
    """
    root = fx.GraphModule(graph, copy.deepcopy(graph.graph), "Compacted")
    adapted: dict[str, nn.Module] = {}
    for name, child in list(root._modules.items()):
        root.add_module(name, _copied(cast(nn.Module, child), name, adapted))
    PassManager([RaiseNorms(), RaiseAttention(), LowerUnits(folded=False), RouteExperts()]).run(root)
    for module in list(root.modules()):
        if graph_of(module) is not None:
            _run_in_python(module, control)
    for path, layer in adapted.items():
        root.set_submodule(path, layer)
    for module in root.modules():
        if graph_of(module) is not None:
            finish(module)
    return root


def _copied(module: nn.Module, path: str, adapted: dict[str, nn.Module]) -> nn.Module:
    """Copy modules with graphs and those that contain them; share all others, and show adapted linears as linears."""
    linear = getattr(module, "base_layer", None)
    if isinstance(linear, nn.Linear):
        adapted[path] = module
        return linear
    if all(graph_of(child) is None for child in module.modules()):
        return module
    copied: Any = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        copied.__dict__[kind] = dict(module.__dict__[kind])
    children = cast("dict[str, nn.Module]", module._modules).items()
    copied.__dict__["_modules"] = {name: _copied(child, f"{path}.{name}", adapted) for name, child in children}
    graph = graph_of(module)
    if graph is not None:
        copied.graph = copy.deepcopy(graph)
        copied._run_with_interpreter = False  # of torch.export's InterpreterModule: runs generated code instead
    return cast(nn.Module, copied)


def _run_in_python(module: nn.Module, control: RoutingControl) -> None:
    """Replace the operators of the dialect, and calls of modules on chosen rows, in one graph."""
    graph = graph_of(module)
    assert graph is not None
    for node in graph.nodes:
        if node.target == irc.decide_rows.default:
            unit = node.kwargs["unit"]
            _subtract_at_once(cast(fx.Node, node.args[0]))
            _call(module, node, f"{unit.rpartition('.')[2]}_decision", _Decision(unit, control))
        elif node.op == "call_module" and [n.target for n in node.all_input_nodes] == [_compact]:
            called = module.get_submodule(node.target)
            if not isinstance(called, nn.Linear):
                _call(module, node, f"{node.target.replace('.', '_')}_on_rows", _OnRows(called))
        elif node.target in _FUNCTIONS:
            node.target = _FUNCTIONS[node.target]


def _subtract_at_once(difference: fx.Node) -> None:
    """Let one function subtract a router's logits, where the passes wrote a cast, two selections and a subtraction."""
    execute, approximate = difference.all_input_nodes
    assert execute.args[1:] == (-1, EXECUTE)
    assert approximate.args[1:] == (-1, APPROXIMATE)
    exact = cast(fx.Node, execute.args[0])
    difference.target, difference.args = difference_of, (exact.args[0],)
    for node in (execute, approximate, exact):
        difference.graph.erase_node(node)


def _call(module: nn.Module, node: fx.Node, name: str, called: nn.Module) -> None:
    module.add_module(name, called)
    node.op, node.target, node.args, node.kwargs = "call_module", name, node.args[:1], {}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some of all tokens of a batch.

    Attributes:
        count: How many.
        index: Where they are in [batch * tokens], in order, int64 [count]; None for none or all of them.
    """

    count: int
    index: torch.Tensor | None = None


def _select_rows(mask: torch.Tensor) -> tuple[_Rows, _Rows]:
    """Return the true and the false tokens of a bool [batch, tokens]."""
    total = mask.numel()
    if total == 1:
        true = int(mask.item())
        return _Rows(true), _Rows(1 - true)
    flat = mask.flatten()
    index = flat.nonzero().flatten()
    count = len(index)
    if count in (0, total):
        return _Rows(count), _Rows(total - count)
    return _Rows(count, index), _Rows(total - count, (~flat).nonzero().flatten())


class _Decision(nn.Module):
    """Decides as a `Mux` does, and records it; returns the tokens that execute and the others."""

    def __init__(self, unit: str, control: RoutingControl) -> None:
        super().__init__()
        self.unit = unit
        self.control = control

    def forward(self, difference: torch.Tensor) -> tuple[_Rows, _Rows]:
        execute = self.control.decide(self.unit, difference, difference)
        if self.control.tape is not None:
            self.control.tape[self.unit] = Record(execute, None, difference)
        return _select_rows(execute)


class _OnRows(nn.Module):
    """Calls a module that keeps the width of its input, unless it has no row [1, n, d]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.module(x)) if x.shape[1] else x


def _compact(x: torch.Tensor, rows: _Rows) -> torch.Tensor:
    flat = x if len(x) == 1 else x.flatten(0, 1).unsqueeze(0)
    if rows.index is not None:
        return flat.index_select(1, rows.index)
    return flat if rows.count else flat[:, :0]


def _scatter(y: torch.Tensor, rows: _Rows, base: torch.Tensor) -> torch.Tensor:
    if rows.index is not None:
        return base.flatten(0, 1).index_copy(0, rows.index, y[0]).view_as(base)
    return y.view_as(base) if rows.count else base


def _scatter_add(y: torch.Tensor, rows: _Rows, base: torch.Tensor) -> torch.Tensor:
    if rows.index is not None:
        return base.flatten(0, 1).index_add(0, rows.index, y[0]).view_as(base)
    return base + y.view_as(base) if rows.count else base


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    chunks = x if x.shape[-1] == len(weight) else x.unflatten(-1, (-1, len(weight)))
    if x.dtype == torch.float32:
        fused: torch.Tensor = F.rms_norm(chunks, weight.shape, weight, eps)
        return fused.view_as(x)
    exact = chunks.float()
    normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).view_as(x)


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
    if not x.shape[1]:
        return x
    half = cos.shape[-1]
    parts = x.unflatten(-1, (heads, -1))
    rotated = parts.shape[-1] == 2 * half
    left, right, *rest = parts.split(half if rotated else (half, half, parts.shape[-1] - 2 * half), -1)
    c, s = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((left * c - right * s, right * c + left * s, *rest), dim=-1).view_as(x)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor,
    past_v: torch.Tensor,
    mask: torch.Tensor,
    heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = append(past_k, k), append(past_v, v)
    return _attend(q, keys, values, mask, heads, scale), keys, values


def _routed_attention(
    q: torch.Tensor,
    rows: _Rows,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor,
    past_v: torch.Tensor,
    mask: torch.Tensor,
    heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = append(past_k, k), append(past_v, v)
    if not rows.count:
        return q, keys, values
    batch, tokens = k.shape[:2]
    index = rows.index
    if index is None:
        return _attend(q.reshape(batch, tokens, -1), keys, values, mask, heads, scale).view_as(q), keys, values
    if batch == 1:
        return _attend(q, keys, values, mask.index_select(2, index), heads, scale), keys, values
    # Sequences execute different numbers of tokens: each is padded to the longest.
    sequence = index // tokens
    counts = sequence.bincount(minlength=batch)
    longest = int(counts.max())
    start = counts.cumsum(0) - counts
    place = sequence * longest + torch.arange(rows.count, device=index.device) - start[sequence]
    queries = q.new_zeros(batch * longest, q.shape[-1]).index_copy(0, place, q[0]).view(batch, longest, -1)
    seen = mask.new_zeros(batch * longest, mask.shape[3]).index_copy(0, place, mask.flatten(0, 2)[index])
    y = _attend(queries, keys, values, seen.view(batch, 1, longest, -1), heads, scale)
    return y.flatten(0, 1)[place].unsqueeze(0), keys, values


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, heads: int, scale: float
) -> torch.Tensor:
    """Attend from q [batch, tokens, heads * size]; the result has its shape.

    Heads that share keys become more rows of one head, so that keys and values are not repeated.
    """
    batch, tokens, width = q.shape
    kv_heads, size = keys.shape[1], keys.shape[3]
    groups = heads // kv_heads
    folded = q.reshape(batch, tokens, kv_heads, groups, size).permute(0, 2, 3, 1, 4)
    seen = mask if tokens == 1 or groups == 1 else mask.repeat(1, 1, groups, 1)
    y = F.scaled_dot_product_attention(
        folded.reshape(batch, kv_heads, groups * tokens, size), keys, values, attn_mask=seen, scale=scale
    )
    return y.view(batch, kv_heads, groups, tokens, size).permute(0, 3, 1, 2, 4).reshape(batch, tokens, width)


_FUNCTIONS = {
    irc.select_rows.default: _select_rows,
    irc.compact.default: _compact,
    irc.scatter.default: _scatter,
    irc.scatter_add.default: _scatter_add,
    irc.rms_norm.default: _rms_norm,
    irc.rotary.default: _rotary,
    irc.attention.default: _attention,
    irc.routed_attention.default: _routed_attention,
}
