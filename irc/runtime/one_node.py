"""Models of one node, written as protobuf: the runtime does without the package onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_OPSET, _IR_VERSION = 13, 8
_INT = 2  # AttributeProto.INT


def one_node_model(
    operator: str, inputs: Sequence[str], output: str, element: int, rank: int, attributes: Mapping[str, int]
) -> bytes:
    """Return a serialized ONNX model of one node of opset 13.

    The numbers of the fields are those of onnx.proto.

    Args:
        operator: Type of the node.
        inputs: Names of its inputs, which are the model's.
        output: Name of its output, which is the model's.
        element: ONNX element type of all of them.
        rank: Dimensions of all of them; their sizes are free.
        attributes: Whole numbers.
    """
    node = b"".join(_text(1, name) for name in inputs) + _text(2, output) + _text(4, operator)
    for name, value in attributes.items():
        node += _message(5, _text(1, name) + _number(3, value) + _number(20, _INT))
    names = (*dict.fromkeys(inputs), output)
    values = [_message(12 if name == output else 11, _value(name, element, rank)) for name in names]
    graph = _message(1, node) + _text(2, operator) + b"".join(values)
    return _number(1, _IR_VERSION) + _message(7, graph) + _message(8, _text(1, "") + _number(2, _OPSET))


def _value(name: str, element: int, rank: int) -> bytes:
    shape = _message(1, b"") * rank
    return _text(1, name) + _message(2, _message(1, _number(1, element) + _message(2, shape)))


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
