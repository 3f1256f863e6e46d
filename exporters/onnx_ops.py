"""The ONNX domain `irc`, one table: each operator of the dialect, its node, and its portable body.

A node of domain `irc` runs everywhere, because the model carries a function of the same name built of standard
operators (opset 23); where the native library is registered, its kernels take the function's place.
The bodies are onnxscript: Python that is compiled to ONNX, never run.
"""

from __future__ import annotations

import onnx
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset

DOMAIN, VERSION, OPSET = "irc", 1, 23
irc = Opset(DOMAIN, VERSION)


@script(irc, default_opset=op)
def SelectRows(mask):
    """Return the flat indices of the true elements, ascending; int64 [n]."""
    flat = op.Reshape(mask, op.Constant(value_ints=[-1]))
    return op.Squeeze(op.NonZero(flat), op.Constant(value_ints=[0]))


@script(irc, default_opset=op)
def Compact(x, rows):
    """Return the tokens `rows` [n] of x [batch, tokens, ...]; [1, n, ...]."""
    shape = op.Concat(op.Constant(value_ints=[1, -1]), op.Shape(x, start=2), axis=0)
    return op.Gather(op.Reshape(x, shape), rows, axis=1)


@script(irc, default_opset=op)
def Scatter(y, rows, base):
    """Return base [batch, tokens, d] with its tokens `rows` [n] replaced by y [1, n, d]."""
    shape = op.Concat(op.Constant(value_ints=[-1]), op.Shape(base, start=2), axis=0)
    indices = op.Unsqueeze(rows, op.Constant(value_ints=[1]))
    flat = op.ScatterND(op.Reshape(base, shape), indices, op.Squeeze(y, op.Constant(value_ints=[0])))
    return op.Reshape(flat, op.Shape(base))


@script(irc, default_opset=op)
def RoutedAttention(q, rows, k, v, past_k, past_v, mask, heads: int, kv_heads: int, scale: float):
    """Attend from the tokens `rows` alone: q [1, n, heads * size], mask [batch, 1, tokens, keys] is added to scores.

    A batch of one computes no score of a skipped token. In a larger one the queries of each sequence are padded to
    the longest; with no query at all only the cache grows.
    """
    minus = op.Constant(value_ints=[-1])
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    keys_shape = op.Shape(mask, start=3)
    flat_mask = op.Reshape(mask, op.Concat(minus, keys_shape, axis=0))
    batch = op.Shape(k, start=0, end=1)
    if op.Greater(op.Size(rows), op.Constant(value_int=0)):
        if op.Equal(op.Squeeze(batch), op.Constant(value_int=1)):
            own_mask = op.Unsqueeze(op.Gather(flat_mask, rows, axis=0), op.Constant(value_ints=[0, 1]))
            y, keys, values = op.Attention(
                q, k, v, own_mask, past_k, past_v, q_num_heads=heads, kv_num_heads=kv_heads, scale=scale
            )
        else:
            count = op.Shape(rows)
            sequence = op.Div(rows, op.Shape(k, start=1, end=2))
            counts = op.ScatterElements(
                op.Expand(zero, batch), sequence, op.Expand(one, count), axis=0, reduction="add"
            )
            longest = op.ReduceMax(counts, keepdims=1)
            starts = op.CumSum(counts, op.Constant(value_int=0), exclusive=1)
            order = op.Range(op.Constant(value_int=0), op.Squeeze(count), op.Constant(value_int=1))
            slots = op.Add(op.Sub(order, op.Gather(starts, sequence)), op.Mul(sequence, longest))
            places = op.Mul(batch, longest)
            features = op.Shape(q, start=2)
            padded = op.ScatterND(
                op.Expand(op.CastLike(op.Constant(value_float=0.0), q), op.Concat(places, features, axis=0)),
                op.Unsqueeze(slots, one),
                op.Squeeze(q, zero),
            )
            tokens = op.ScatterElements(op.Expand(zero, places), slots, rows, axis=0)
            own_mask_n = op.Reshape(
                op.Gather(flat_mask, tokens, axis=0), op.Concat(batch, one, longest, keys_shape, axis=0)
            )
            y_padded, keys, values = op.Attention(
                op.Reshape(padded, op.Concat(batch, longest, features, axis=0)),
                k, v, own_mask_n, past_k, past_v, q_num_heads=heads, kv_num_heads=kv_heads, scale=scale,
            )  # fmt: skip
            y = op.Gather(op.Reshape(y_padded, op.Concat(one, minus, features, axis=0)), slots, axis=1)
    else:
        size = op.Shape(past_k, start=3)
        split = op.Concat(op.Shape(k, start=0, end=2), minus, size, axis=0)
        y = op.Identity(q)
        keys = op.Concat(past_k, op.Transpose(op.Reshape(k, split), perm=[0, 2, 1, 3]), axis=2)
        values = op.Concat(past_v, op.Transpose(op.Reshape(v, split), perm=[0, 2, 1, 3]), axis=2)
    return y, keys, values


FUNCTIONS = (SelectRows, Compact, Scatter, RoutedAttention)


def function_protos() -> list[onnx.FunctionProto]:
    """Return the portable bodies of all operators of the domain."""
    return [function.to_function_proto() for function in FUNCTIONS]


_SCHEMAS = (
    ("SelectRows", "mask: B -> rows: I", ""),
    ("Compact", "x: T, rows: I -> y: T", ""),
    ("Scatter", "y: T, rows: I, base: T -> z: T", ""),
    (
        "RoutedAttention",
        "q: T, rows: I, k: T, v: T, past_k: T, past_v: T, mask: T -> y: T, present_k: T, present_v: T",
        "heads: INT, kv_heads: INT, scale: FLOAT",
    ),
)
_TYPES = {
    "B": ["tensor(bool)"],
    "I": ["tensor(int64)"],
    "T": ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"],
}


def register_schemas() -> None:
    """Make the operators known to onnx in this process, so that graphs with them can be built and checked."""
    if onnx.defs.has(FUNCTIONS[0].name, DOMAIN):
        return
    for name, signature, attributes in _SCHEMAS:
        inputs, outputs = ([entry.split(": ") for entry in side.split(", ")] for side in signature.split(" -> "))
        kinds = sorted({kind for _, kind in inputs + outputs})
        schema = onnx.defs.OpSchema(
            name,
            DOMAIN,
            VERSION,
            doc=next(function.function_ir.doc_string or "" for function in FUNCTIONS if function.name == name),
            inputs=[onnx.defs.OpSchema.FormalParameter(label, kind) for label, kind in inputs],
            outputs=[onnx.defs.OpSchema.FormalParameter(label, kind) for label, kind in outputs],
            type_constraints=[(kind, _TYPES[kind], "") for kind in kinds],
            attributes=[
                onnx.defs.OpSchema.Attribute(label, getattr(onnx.defs.OpSchema.AttrType, kind), required=True)
                for label, kind in (entry.split(": ") for entry in attributes.split(", ") if entry)
            ],
        )
        onnx.defs.register_schema(schema)
