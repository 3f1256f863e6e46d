"""The data types of exported models, as ONNX, ONNX Runtime and Triton call them; needs neither torch nor onnx."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OnnxType:
    """A data type.

    Attributes:
        code: Its number in `onnx.TensorProto.DataType`.
        name: Its name there.
        text: A tensor of it in ONNX Runtime and in operator schemas.
        triton: Its name in Triton's `config.pbtxt`.
        masked: What attention adds to the scores of masked tokens, in floating types. Finite, because a row that sees
            nothing must not become NaN.
    """

    code: int
    name: str
    text: str
    triton: str
    masked: float | None = None


FP32 = OnnxType(1, "FLOAT", "tensor(float)", "TYPE_FP32", -1e30)
FP16 = OnnxType(10, "FLOAT16", "tensor(float16)", "TYPE_FP16", -3e4)
BF16 = OnnxType(16, "BFLOAT16", "tensor(bfloat16)", "TYPE_BF16", -1e30)
INT64 = OnnxType(7, "INT64", "tensor(int64)", "TYPE_INT64")
BOOL = OnnxType(9, "BOOL", "tensor(bool)", "TYPE_BOOL")
FLOATS = (FP32, FP16, BF16)
ALL = (*FLOATS, INT64, BOOL)


def of_name(name: str) -> OnnxType:
    """Return the type that ONNX calls `name`, such as `FLOAT`."""
    return next(kind for kind in ALL if kind.name == name)


def of_code(code: int) -> OnnxType:
    """Return the type whose number in `onnx.TensorProto.DataType` is `code`."""
    return next(kind for kind in ALL if kind.code == code)
