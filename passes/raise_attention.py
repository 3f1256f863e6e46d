"""Replaces a captured attention unit by `irc::rotary` and `irc::attention`, where tokens stay the second dimension."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from passes import dialect  # noqa: F401 - registers the operators
from passes.base import Pass, PassError, PassResult, finish, graph_of
from passes.match import match_units
from passes.name_modules import PART

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten.contiguous.default, aten.alias.default})
_CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.type_as.default})
_REPEATS = frozenset({*_VIEWS, aten.unsqueeze.default, aten.slice.Tensor, aten.expand.default})


@dataclass
class _Heads:
    """One of q, k, v between its linear and the scores.

    Attributes:
        source: The linear's output [batch, tokens, heads * size].
        norm: An `irc::rms_norm` over each head, or None.
        cos: Cosines [batch, tokens, size], None without rotation; `sin` likewise.
        heads: Number of heads.
    """

    source: fx.Node
    norm: fx.Node | None
    cos: fx.Node | None
    sin: fx.Node | None
    heads: int


class _NoMatch(Exception):
    """Carries what the attention unit has that the pass does not support."""


class RaiseAttention(Pass):
    """Replaces heads, rotation, repeated keys, mask and scores of every attention unit by two operators.

    Run after RaiseNorms, so that norms over heads are one node.
    """

    def call(self, model: fx.GraphModule) -> PassResult:
        """Raise all attention units; refuse one of another form."""
        modified = False
        for unit in match_units(model).units:
            module = model.get_submodule(unit.name)
            graph = graph_of(module)
            if unit.kind != "attention" or graph is None:
                continue
            scores = [node for node in graph.nodes if node.target == _SDPA]
            if not scores:
                continue
            try:
                _raise(graph, scores)
            except _NoMatch as error:
                remedy = "export a model whose attention has rotary positions, a key/value cache and a mask"
                raise PassError(unit.name, str(error), remedy) from error
            finish(module)
            modified = True
        return PassResult(model, modified)


def _raise(graph: fx.Graph, scores: list[fx.Node]) -> None:
    if len(scores) > 1:
        raise _NoMatch(f"{len(scores)} attention operators in one unit; expected one")
    sdpa = scores[0]
    query, present_k, present_v = sdpa.args[0], _unrepeat(sdpa.args[1]), _unrepeat(sdpa.args[2])
    mask = sdpa.args[3] if len(sdpa.args) > 3 else sdpa.kwargs.get("attn_mask")
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
        raise _NoMatch("its mask is missing or not boolean; expected [batch, 1, tokens, keys]")
    if sdpa.kwargs.get("dropout_p") or sdpa.kwargs.get("is_causal"):
        raise _NoMatch("it has dropout or is causal in addition to its mask; expected a mask alone")
    (past_k, new_k), (past_v, new_v) = _cache(present_k), _cache(present_v)
    q, k, v = _heads(query), _heads(new_k), _heads(new_v)
    scale = sdpa.kwargs.get("scale") or cast(fx.Node, query).meta["val"].shape[-1] ** -0.5
    output, result = _output(graph, sdpa)
    with graph.inserting_before(output):
        parts = [_emit(graph, part) for part in (q, k, v)]
        call = graph.call_function(
            torch.ops.irc.attention.default, (*parts, past_k, past_v, mask, q.heads, scale), name="attention"
        )
        y, keys, values = (graph.call_function(operator.getitem, (call, index)) for index in range(3))
    for node, old in ((y, cast(fx.Node, output.args[0])), (keys, present_k), (values, present_v)):
        node.meta["val"] = old.meta.get("val")
    output.replace_input_with(cast(fx.Node, output.args[0]), y)
    result.replace_input_with(present_k, keys)
    result.replace_input_with(present_v, values)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _unrepeat(node: Any) -> fx.Node:
    """Go back from keys or values repeated for every query head to those of the cache."""
    while isinstance(node, fx.Node) and node.target in _REPEATS:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target != aten.cat.default:
        raise _NoMatch(
            f"its keys or values come from {getattr(node, 'target', node)}; expected past and new ones joined"
        )
    return node


def _cache(present: fx.Node) -> tuple[fx.Node, fx.Node]:
    parts, dim = cast("list[fx.Node]", present.args[0]), present.args[1] if len(present.args) > 1 else 0
    if len(parts) != 2 or dim not in (-2, 2) or parts[0].op != "placeholder":
        raise _NoMatch("its cache is not the past followed by the new tokens along the length")
    return parts[0], parts[1]


def _heads(node: Any) -> _Heads:
    """Read [batch, heads, tokens, size] back to the linear that made it."""
    count = node.meta["val"].shape[1]
    cos = sin = norm = None
    node = _skip(node, _CASTS)
    rest = None
    if isinstance(node, fx.Node) and node.target == aten.cat.default:
        node, rest = _two(node)
    if isinstance(node, fx.Node) and node.target == aten.add.Tensor:
        node, cos, sin = _unrotate(node)
    if rest is not None:
        node = _whole(node, rest)
    node = _skip(node, {aten.contiguous.default})
    if isinstance(node, fx.Node) and node.target == torch.ops.irc.rms_norm.default:
        norm, node = node, node.args[0]
    if (
        not isinstance(node, fx.Node)
        or node.target != aten.transpose.int
        or set(node.args[1:]) not in ({1, 2}, {-3, -2})
    ):
        raise _NoMatch(
            f"heads come from {getattr(node, 'target', node)}; expected [batch, tokens, heads, size] transposed"
        )
    source: Any = node.args[0]
    if norm is None and isinstance(source, fx.Node) and source.target == torch.ops.irc.rms_norm.default:
        norm, source = source, source.args[0]
    source = _skip(source, _VIEWS)
    if not isinstance(source, fx.Node) or source.meta["val"].ndim != 3:
        raise _NoMatch("heads are not split from a linear's output [batch, tokens, features]")
    return _Heads(source, norm, cos, sin, int(count))


def _unrotate(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Read x * cos + cat(-right, left) * sin; return x, cos and sin, the last two [batch, tokens, size]."""
    straight, turned = (argument for argument in node.args[:2])
    if not all(isinstance(n, fx.Node) and n.target == aten.mul.Tensor for n in (straight, turned)):
        raise _NoMatch("heads are added to a value that is not a rotation")
    x, cos = cast(fx.Node, straight).args[:2]
    joined, sin = cast(fx.Node, turned).args[:2]
    halves = cast(fx.Node, joined).args[0] if cast(fx.Node, joined).target == aten.cat.default else ()
    size = cast(fx.Node, x).meta["val"].shape[-1]
    if not isinstance(halves, (list, tuple)) or len(halves) != 2:
        raise _NoMatch("its rotation does not join two halves")
    right, left = _argument(halves[0], aten.neg.default), halves[1]
    starts = [_slice(half, cast(fx.Node, x)) for half in (left, right)]
    if starts != [(0, size // 2), (size // 2, size)]:
        raise _NoMatch(f"its rotation does not split {size} features at {size // 2}")
    return cast(fx.Node, x), _angles(cos), _angles(sin)


def _two(joined: fx.Node) -> tuple[Any, Any]:
    parts: Any = joined.args[0]
    if len(parts) != 2:
        raise _NoMatch(f"heads are joined from {len(parts)} parts; expected rotated and other features")
    return parts[0], parts[1]


def _whole(rotated: Any, rest: Any) -> fx.Node:
    """Return the heads whose first features are rotated and whose others, none or more, are not."""
    source = rotated.args[0] if isinstance(rotated, fx.Node) and rotated.args else None
    if isinstance(source, fx.Node):
        size = source.meta["val"].shape[-1]
        first = (0, size) if rotated.target == aten.alias.default else _slice(rotated, source)
        if first and first[0] == 0 and _slice(rest, source) == (first[1], size):
            return source
    raise _NoMatch("heads are joined from parts that are not the rotated and the other features of one linear")


def _slice(node: Any, x: fx.Node) -> tuple[int, int] | None:
    if (
        not isinstance(node, fx.Node)
        or node.target != aten.slice.Tensor
        or node.args[0] is not x
        or node.args[1] not in (3, -1)
    ):
        return None
    size = x.meta["val"].shape[-1]
    return int(cast(int, node.args[2])), min(int(cast(int, node.args[3])), size)


def _angles(node: Any) -> fx.Node:
    source = _argument(node, aten.unsqueeze.default)
    if not isinstance(source, fx.Node) or node.args[1] != 1:
        raise _NoMatch("cosines and sines are not [batch, 1, tokens, size]")
    return source


def _argument(node: Any, target: Any) -> Any:
    return node.args[0] if isinstance(node, fx.Node) and node.target == target else None


def _skip(node: Any, targets: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in targets:
        node = node.args[0]
    return node


def _output(graph: fx.Graph, sdpa: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the linear that reads the heads put together again, and the graph's output."""
    node = sdpa
    while node.op == "call_function":
        if len(node.users) != 1 or (node is not sdpa and node.target not in _VIEWS | {aten.transpose.int}):
            raise _NoMatch(f"the result of its scores goes through {node.target}; expected the output linear")
        node = next(iter(node.users))
    if node.op != "call_module":
        raise _NoMatch("the result of its scores does not reach an output linear")
    return node, next(n for n in graph.nodes if n.op == "output")


def _emit(graph: fx.Graph, part: _Heads) -> fx.Node:
    node = part.source
    if part.norm is not None:
        node = graph.call_function(torch.ops.irc.rms_norm.default, (node, *part.norm.args[1:]))
        node.meta[PART] = part.norm.meta.get(PART, "")
    if part.cos is not None:
        # Both halves of a head turn by the same angles: the operator reads them once.
        half = part.cos.meta["val"].shape[-1] // 2
        cos, sin = (graph.call_function(aten.slice.Tensor, (angles, -1, 0, half)) for angles in (part.cos, part.sin))
        kind, wanted = part.cos.meta["val"].dtype, part.source.meta["val"].dtype
        if kind != wanted:  # angles that were kept in float32
            cos, sin = (graph.call_function(aten.to.dtype, (angles, wanted)) for angles in (cos, sin))
        node = graph.call_function(torch.ops.irc.rotary.default, (node, cos, sin, part.heads))
    node.meta.setdefault("val", part.source.meta.get("val"))
    return node
