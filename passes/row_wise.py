"""Which operators treat each token separately: one token's values in, the same token's values out."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

# Operators that compute each number from the numbers at the same place.
_ELEMENTWISE = frozenset(
    "abs add alias clamp clone contiguous detach div dropout elu eq erf exp gelu getitem hardsigmoid hardswish "
    "hardtanh leaky_relu linear log mish mul neg pow reciprocal relu relu6 rsqrt sigmoid silu softplus sqrt square sub "
    "tanh to type_as _to_copy".split()
)
_END = 9223372036854775807
# Operators that treat each token separately if their dimension is that of the features.
_OVER_FEATURES = frozenset(
    "amax chunk layer_norm mean rms_norm slice softmax split split_with_sizes sum topk var".split()
)


def is_row_wise(node: fx.Node) -> bool:
    """Whether each token's result depends on that token alone."""
    name = operator_name(node)
    if name in _ELEMENTWISE:
        return True
    if name not in _OVER_FEATURES:
        return False
    if name == "slice" and tuple(node.args[2:4]) == (0, _END):
        return True
    arguments = _arguments(node)
    dims = arguments.get("dim", -len(cast("list[int]", arguments.get("normalized_shape", [0]))))
    rank = getattr(node.all_input_nodes[0].meta.get("val"), "ndim", 0)
    last = {-1, rank - 1} if rank else {-1}
    return set(dims if isinstance(dims, (list, tuple)) else [dims]) <= last


def _arguments(node: fx.Node) -> dict[str, object]:
    """Return the arguments of an operator by name, defaults included."""
    schema = cast(torch._ops.OpOverload, node.target)._schema.arguments
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    values |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return values | dict(node.kwargs)


def operator_name(node: fx.Node) -> str:
    """Return the name of the operator that a node calls, without namespace and overload."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", getattr(node.target, "__name__", "")))
