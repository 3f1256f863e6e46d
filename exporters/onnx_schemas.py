"""The schemas of the operators of the ONNX domain `irc`, one line per operator."""

from __future__ import annotations

import onnx

from exporters.onnx_dtypes import BOOL, FLOATS, FP32, INT64
from exporters.onnx_format import DOMAIN, VERSION
from exporters.onnx_ops import FUNCTIONS

_SCHEMAS = (
    ("SelectRows", "mask: B -> executed: I, skipped: I", "padded: INT = 0"),
    ("DecideRows", "difference: F -> executed: I, skipped: I", "padded: INT = 0"),
    ("Compact", "x: T, rows: I -> y: T", ""),
    ("Scatter", "y: T, rows: I, base: T -> z: T", ""),
    ("ScatterAdd", "y: T, rows: I, base: T -> z: T", ""),
    ("RoutedMatMul", "x: T, rows: I, w: T -> y: T", ""),
    ("RoutedGate", "x: T, rows: I, gate: T, up: T -> y: T", ""),
    ("Router", "x: T, w1: T, b1: T, w2: T, b2: T -> difference: F", ""),
    ("ForecastAdd", "x: T, rows: I, base: T, down: T, up: T, bias: T -> z: T", ""),
    (
        "RoutedAttention",
        "q: T, rows: I, k: T, v: T, past_k: T, past_v: T, mask: T -> y: T, present_k: T, present_v: T",
        "heads: INT, kv_heads: INT, scale: FLOAT",
    ),
    (
        "ReducedAttention",
        "q: T, rows: I, k: T, v: T, past_k: T, past_v: T, past_slots: I, mask: T"
        " -> y: T, present_k: T, present_v: T, present_slots: I",
        "heads: INT, kv_heads: INT, scale: FLOAT, masked: FLOAT",
    ),
    ("RaggedPlaces", "rows: I, like: T -> places: I, index: I", ""),
)
_TYPES = {"B": [BOOL.text], "F": [FP32.text], "I": [INT64.text], "T": [kind.text for kind in FLOATS]}


def register_schemas() -> None:
    """Register the operators with onnx in this process, so that graphs with them can be built and checked."""
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
            attributes=[_attribute(*entry.split(": ")) for entry in attributes.split(", ") if entry],
        )
        onnx.defs.register_schema(schema)


def _attribute(label: str, kind: str) -> onnx.defs.OpSchema.Attribute:
    """Make an attribute of a schema, required unless its kind has a default, as in `INT = 0`."""
    kind, _, default = kind.partition(" = ")
    if default:
        return onnx.defs.OpSchema.Attribute(label, onnx.helper.make_attribute(label, int(default)))
    return onnx.defs.OpSchema.Attribute(label, getattr(onnx.defs.OpSchema.AttrType, kind), required=True)
