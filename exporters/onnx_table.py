"""Translates each operator of the dialect to ONNX: to a node of domain `irc` or to a standard one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset23 as op

from exporters.onnx_dtypes import of_name
from exporters.onnx_ops import irc
from exporters.onnx_schemas import register_schemas
from passes import dialect  # noqa: F401 - registers the operators

UNIT = "irc.unit"
"""Key of a DecideRows node's metadata under which the name of its unit travels to the end of the export."""


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translation of every operator of the dialect, in the form that torch.onnx.export takes."""
    register_schemas()
    return {
        torch.ops.irc.select_rows.default: _select_rows,
        torch.ops.irc.decide_rows.default: _decide_rows,
        torch.ops.irc.compact.default: _compact,
        torch.ops.irc.scatter.default: _scatter,
        torch.ops.irc.scatter_add.default: _scatter_add,
        torch.ops.irc.routed_matmul.default: _routed_matmul,
        torch.ops.irc.routed_gate.default: _routed_gate,
        torch.ops.irc.router.default: _router,
        torch.ops.irc.forecast_add.default: _forecast_add,
        torch.ops.irc.rms_norm.default: _rms_norm,
        torch.ops.irc.rotary.default: _rotary,
        torch.ops.irc.attention.default: _attention,
        torch.ops.irc.routed_attention.default: _routed_attention,
        torch.ops.irc.reduced_attention.default: _reduced_attention,
    }


def _select_rows(mask, padded=0):
    return irc.SelectRows(mask, padded=padded) if padded else irc.SelectRows(mask)


def _decide_rows(difference, padded=0, unit=""):
    executed, skipped = irc.DecideRows(difference, padded=padded) if padded else irc.DecideRows(difference)
    executed.producer().metadata_props[UNIT] = unit
    return executed, skipped


def _compact(x, rows):
    return irc.Compact(x, rows)


def _scatter(y, rows, base):
    return irc.Scatter(y, rows, base)


def _scatter_add(y, rows, base):
    return irc.ScatterAdd(y, rows, base)


def _routed_matmul(x, rows, weight):
    return irc.RoutedMatMul(x, rows, weight)


def _routed_gate(x, rows, gate, up):
    return irc.RoutedGate(x, rows, gate, up)


def _router(x, w1, b1, w2, b2):
    return irc.Router(x, w1, b1, w2, b2)


def _forecast_add(x, rows, base, down, up, bias):
    return irc.ForecastAdd(x, rows, base, down, up, bias)


def _rms_norm(x, weight, eps):
    features, size = int(x.shape[-1]), int(weight.shape[0])
    if features == size:
        return op.RMSNormalization(x, weight, axis=-1, epsilon=eps)
    # Every size is explicit: without any row, -1 would be ambiguous.
    chunks = op.Reshape(x, op.Constant(value_ints=[0, 0, features // size, size]))
    normed = op.RMSNormalization(chunks, weight, axis=-1, epsilon=eps)
    return op.Reshape(normed, op.Constant(value_ints=[0, 0, features]))


def _rotary(x, cos, sin, heads):
    rotated = 2 * int(cos.shape[-1])
    partly = rotated if rotated * heads < int(x.shape[-1]) else 0
    return op.RotaryEmbedding(x, cos, sin, num_heads=heads, rotary_embedding_dim=partly)


def _attention(q, k, v, past_k, past_v, mask, heads, scale):
    """Attend from every row by the operator of routed units, so that a dense model has its kernel and cache too."""
    size = op.Shape(q, start=0, end=2)
    ones = op.Expand(op.Constant(value_ints=[1]), size)
    every = op.Unsqueeze(op.Transpose(op.NonZero(ones), perm=[1, 0]), op.Constant(value_ints=[0]))
    queries = op.Reshape(q, op.Constant(value_ints=[1, -1, int(q.shape[-1])]))
    y, *cache = _routed_attention(queries, every, k, v, past_k, past_v, mask, heads, scale)
    return op.Reshape(y, op.Concat(size, op.Constant(value_ints=[-1]), axis=0)), *cache


def _routed_attention(q, rows, k, v, past_k, past_v, mask, heads, scale):
    added, kv_heads = _flat_mask(mask, k), int(past_k.shape[1])  # k, because a reshaped q has no data type here
    return irc.RoutedAttention(q, rows, k, v, past_k, past_v, added, heads=heads, kv_heads=kv_heads, scale=scale)


def _reduced_attention(q, rows, k, v, past_k, past_v, past_slots, mask, heads, scale):
    added, kv_heads = _flat_mask(mask, q), int(past_k.shape[1])
    options = {"heads": heads, "kv_heads": kv_heads, "scale": scale, "masked": of_name(q.dtype.name).masked}
    return irc.ReducedAttention(q, rows, k, v, past_k, past_v, past_slots, added, **options)


def _flat_mask(mask, like):
    """Return a mask [batch, 1, tokens, keys] as numbers added to scores, [batch, tokens, keys]; layers share a node."""
    value = op.Constant(value_float=of_name(like.dtype.name).masked)
    added = op.CastLike(op.Where(mask, op.Constant(value_float=0.0), value), like)
    return op.Squeeze(added, op.Constant(value_ints=[1]))
