"""The portable bodies of the operators of the ONNX domain `irc`; exporters/onnx_schemas.py has their schemas.

A node of domain `irc` runs everywhere, because the model carries a function of the same name built of standard
operators (opset 23); where the native library is registered, its kernels take the function's place.
The bodies are onnxscript: Python that is compiled to ONNX, never run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import onnx
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset

from exporters.onnx_format import DOMAIN, VERSION

irc = Opset(DOMAIN, VERSION)


@script(irc, default_opset=op)
def SelectRows(mask, padded: int = 0):
    """Return the true and the false tokens of mask [batch, tokens] as (sequence, token) pairs, int64 [1, n, 2].

    With at most `padded` tokens, a kernel may return batch * tokens rows of each kind and pad the end with (-1, -1);
    this body never does.
    """
    zero = op.Constant(value_ints=[0])
    true = op.Unsqueeze(op.Transpose(op.NonZero(mask), perm=[1, 0]), zero)
    false = op.Unsqueeze(op.Transpose(op.NonZero(op.Not(mask)), perm=[1, 0]), zero)
    return true, false


@script(irc, default_opset=op)
def DecideRows(difference, padded: int = 0):
    """Return the tokens that execute and those that are approximated, int64 [1, n, 2], as SelectRows does.

    A logit difference, float32 [batch, tokens], below 0 approximates; everything else, NaN too, executes.
    """
    execute = op.Not(op.Less(difference, op.Constant(value_float=0.0)))
    executed, skipped = irc.SelectRows(execute, padded=padded)
    return executed, skipped


@script(irc, default_opset=op)
def Compact(x, rows):
    """Return the tokens `rows` [1, n, 2] of x [batch, tokens, d]; [1, n, d]."""
    return op.GatherND(x, rows)


@script(irc, default_opset=op)
def Scatter(y, rows, base):
    """Return base [batch, tokens, d] with its tokens `rows` [1, n, 2] replaced by y [1, n, d]."""
    return op.ScatterND(base, rows, y)


@script(irc, default_opset=op)
def ScatterAdd(y, rows, base):
    """Return base [batch, tokens, d] with y [1, n, d] added to its tokens `rows` [1, n, 2], which are all different."""
    return op.ScatterND(base, rows, y, reduction="add")


@script(irc, default_opset=op)
def ScatterAddHalf(y, rows, base):
    """Return base [batch, tokens, d] with y [1, n, d] added to its tokens `rows` [1, n, 2], which are all different.

    ONNX Runtime's CPU provider cannot add 16-bit numbers in ScatterND, so the sums are computed first.
    """
    return op.ScatterND(base, rows, op.Add(op.GatherND(base, rows), y))


@script(irc, default_opset=op)
def RoutedMatMul(x, rows, w):
    """Return x [1, n, d] @ w [d, out]; a kernel skips it if all `rows` [1, n, 2] are padding."""
    return op.MatMul(x, w)


@script(irc, default_opset=op)
def RoutedGate(x, rows, gate, up):
    """Return silu(x @ gate) * (x @ up) of x [1, n, d]; gate and up are [d, out], `rows` as in RoutedMatMul."""
    gated = op.MatMul(x, gate)
    return op.Mul(op.Mul(gated, op.Sigmoid(gated)), op.MatMul(x, up))


@script(irc, default_opset=op)
def Router(x, w1, b1, w2, b2):
    """Return the execute logit minus the approximate logit of x [batch, tokens, d], float32 [batch, tokens].

    w1 is [d, hidden], b1 [hidden], w2 [hidden, 1], b2 [1].
    """
    logit = op.Add(op.MatMul(op.Relu(op.Add(op.MatMul(x, w1), b1)), w2), b2)
    return op.Cast(op.Squeeze(logit, op.Constant(value_ints=[-1])), to=onnx.TensorProto.FLOAT)


@script(irc, default_opset=op)
def ForecastAdd(x, rows, base, down, up, bias):
    """Return base [batch, tokens, out] with x's tokens `rows` [1, n, 2] @ down @ up + bias added to the same tokens.

    x is [batch, tokens, d], down [d, rank], up [rank, out], bias [out]; no row comes twice.
    """
    forecast = op.Add(op.MatMul(op.MatMul(op.GatherND(x, rows), down), up), bias)
    return irc.ScatterAdd(forecast, rows, base)


@script(irc, default_opset=op)
def RaggedPlaces(rows, like):
    """Return places for `rows` [1, n, 2] if each sequence starts with its own rows, padded to the longest.

    The place of each row, int64 [1, n, 2], and the row at each place, int64 [batch, longest], 0 in the padding. The
    batch size is that of `like`.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    batch = op.Shape(like, start=0, end=1)
    sequence = op.Gather(rows, op.Constant(value_int=0), axis=2)
    flat = op.Squeeze(sequence, zero)
    count = op.Shape(flat)
    counts = op.ScatterElements(op.Expand(zero, batch), flat, op.Expand(one, count), axis=0, reduction="add")
    starts = op.CumSum(counts, op.Constant(value_int=0), exclusive=1)
    order = op.Unsqueeze(op.Range(op.Constant(value_int=0), op.Squeeze(count), op.Constant(value_int=1)), zero)
    place = op.Sub(order, op.Gather(starts, flat))
    last = op.Constant(value_ints=[2])
    places = op.Concat(op.Unsqueeze(sequence, last), op.Unsqueeze(place, last), axis=2)
    longest = op.ReduceMax(op.Concat(zero, counts, axis=0), keepdims=1)  # the maximum of no elements fails or crashes
    size = op.Concat(batch, longest, axis=0)
    return places, op.ScatterND(op.Expand(zero, size), places, order)


@script(irc, default_opset=op)
def RoutedAttention(q, rows, k, v, past_k, past_v, mask, heads: int, kv_heads: int, scale: float):
    """Attend from the tokens `rows` alone: q [1, n, heads * size], mask [batch, tokens, keys] is added to scores.

    If all tokens attend, this is plain attention. Otherwise a batch of one computes no scores of skipped tokens, and a
    larger batch pads the queries of each sequence to the longest. Without any query only the cache grows.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    tokens = op.Shape(mask, start=0, end=2)
    single = op.Equal(op.Squeeze(op.Shape(mask, start=0, end=1)), op.Constant(value_int=1))
    if op.Equal(op.Size(rows), op.Mul(op.Constant(value_int=2), op.ReduceProd(tokens, keepdims=0))):
        queries = op.Reshape(q, op.Concat(tokens, op.Constant(value_ints=[-1]), axis=0))
        y_all, keys, values = op.Attention(
            queries, k, v, op.Unsqueeze(mask, one), past_k, past_v,
            q_num_heads=heads, kv_num_heads=kv_heads, scale=scale,
        )  # fmt: skip
        y = op.Reshape(y_all, op.Shape(q))
    else:
        if op.Greater(op.Size(rows), op.Constant(value_int=0)):
            own_mask = op.GatherND(mask, rows)
            if single:
                y, keys, values = op.Attention(
                    q, k, v, op.Unsqueeze(own_mask, zero), past_k, past_v,
                    q_num_heads=heads, kv_num_heads=kv_heads, scale=scale,
                )  # fmt: skip
            else:
                places, index = irc.RaggedPlaces(rows, mask)
                queries = op.Gather(op.Squeeze(q, zero), index, axis=0)
                masks = op.Gather(op.Squeeze(own_mask, zero), index, axis=0)
                y_padded, keys, values = op.Attention(
                    queries, k, v, op.Unsqueeze(masks, one), past_k, past_v,
                    q_num_heads=heads, kv_num_heads=kv_heads, scale=scale,
                )  # fmt: skip
                y = op.GatherND(y_padded, places)
        else:
            size = op.Shape(past_k, start=3)
            split = op.Concat(op.Shape(k, start=0, end=2), op.Constant(value_ints=[-1]), size, axis=0)
            y = op.Identity(q)
            keys = op.Concat(past_k, op.Transpose(op.Reshape(k, split), perm=[0, 2, 1, 3]), axis=2)
            values = op.Concat(past_v, op.Transpose(op.Reshape(v, split), perm=[0, 2, 1, 3]), axis=2)
    return y, keys, values


@script(irc, default_opset=op)
def ReducedAttention(
    q, rows, k, v, past_k, past_v, past_slots, mask, heads: int, kv_heads: int, scale: float, masked: float
):
    """Attend from the tokens `rows` to stored ones and store their own k and v: q, k, v are [1, n, ...].

    `past_slots` [batch, stored] is the index of each stored token in its sequence, -1 for padding. Without rows
    nothing is stored. In a batch each sequence's rows are padded to the longest.
    """
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    if op.Greater(op.Size(rows), op.Constant(value_int=0)):
        single = op.Equal(op.Squeeze(op.Shape(mask, start=0, end=1)), op.Constant(value_int=1))
        past = op.Sub(op.Shape(mask, start=2, end=3), op.Shape(mask, start=1, end=2))
        new = op.Add(op.Gather(rows, op.Constant(value_int=1), axis=2), past)
        own_mask = op.GatherND(mask, rows)
        none = op.CastLike(op.Constant(value_float=masked), mask)
        if single:
            slots = op.Concat(past_slots, new, axis=1)
            known = op.Gather(own_mask, op.Squeeze(slots, zero), axis=2)
            y, keys, values = op.Attention(
                q, k, v, op.Unsqueeze(op.Where(op.Less(slots, zero), none, known), zero), past_k, past_v,
                q_num_heads=heads, kv_num_heads=kv_heads, scale=scale,
            )  # fmt: skip
        else:
            places, index = irc.RaggedPlaces(rows, mask)
            size = op.Shape(index)
            queries = op.Gather(op.Squeeze(q, zero), index, axis=0)
            new_k = op.Gather(op.Squeeze(k, zero), index, axis=0)
            new_v = op.Gather(op.Squeeze(v, zero), index, axis=0)
            masks = op.Gather(op.Squeeze(own_mask, zero), index, axis=0)
            slots = op.Concat(past_slots, op.ScatterND(op.Expand(op.Neg(one), size), places, new), axis=1)
            column = op.Unsqueeze(slots, one)
            wanted = op.Expand(column, op.Concat(size, op.Shape(slots, start=1), axis=0))
            known = op.Where(op.Less(column, zero), none, op.GatherElements(masks, wanted, axis=2))
            y_padded, keys, values = op.Attention(
                queries, new_k, new_v, op.Unsqueeze(known, one), past_k, past_v,
                q_num_heads=heads, kv_num_heads=kv_heads, scale=scale,
            )  # fmt: skip
            y = op.GatherND(y_padded, places)
    else:
        y = op.Identity(q)
        keys = op.Identity(past_k)
        values = op.Identity(past_v)
        slots = op.Identity(past_slots)
    return y, keys, values, slots


FUNCTIONS = (
    SelectRows,
    DecideRows,
    Compact,
    Scatter,
    ScatterAdd,
    RoutedMatMul,
    RoutedGate,
    Router,
    ForecastAdd,
    RoutedAttention,
    ReducedAttention,
    RaggedPlaces,
)


def function_protos(used: set[str], half: bool = False) -> list[onnx.FunctionProto]:
    """Return the portable bodies of operators of the domain, and of those that they call.

    Args:
        used: Names of the operators in a model.
        half: Whether the model computes in 16 bits.
    """
    bodies = {function.name: function.to_function_proto() for function in FUNCTIONS}
    if half:
        bodies["ScatterAdd"] = ScatterAddHalf.to_function_proto()
        bodies["ScatterAdd"].name = "ScatterAdd"
    inner = {node.op_type for name in used for node in _nodes(bodies[name].node) if node.domain == DOMAIN}
    found = [body for name, body in bodies.items() if name in used | inner]
    for body in found:
        counts: Counter[str] = Counter()
        for node in _nodes(body.node):
            node.name = f"{body.name}/{node.op_type}_{counts[node.op_type]}"
            counts[node.op_type] += 1
        if all(entry.domain != DOMAIN for entry in body.opset_import):
            body.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
    return found


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g.node)
