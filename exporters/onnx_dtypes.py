"""THE table of data types: what people, torch, NumPy, ONNX, ONNX Runtime and Triton call each of them.

Plain data: it imports neither torch nor onnx. `irc.dtypes` adds what needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataType:
    """A data type of weights, values or tokens.

    Attributes:
        short: What options and files call it: `fp32`.
        long: What torch calls it: `float32`.
        numpy: What NumPy calls it, None where NumPy has no such type.
        bytes: Size of one number.
        code: Its number in `onnx.TensorProto.DataType`.
        name: Its name there.
        text: A tensor of it, in ONNX Runtime and in operator schemas.
        triton: Its name in Triton's `config.pbtxt`.
        on_cpu: Whether ONNX Runtime's CPU provider runs models of this type.
        masked: What attention adds to the scores of masked tokens, in floating types. Finite, because a row that sees
            nothing must not become NaN.
        rounding: Distance from 1 to the next larger number, in floating types.
    """

    short: str
    long: str
    numpy: str | None
    bytes: int
    code: int
    name: str
    text: str
    triton: str
    on_cpu: bool = True
    masked: float | None = None
    rounding: float | None = None


FP32 = DataType(
    short="fp32",
    long="float32",
    numpy="float32",
    bytes=4,
    code=1,
    name="FLOAT",
    text="tensor(float)",
    triton="TYPE_FP32",
    masked=-1e30,
    rounding=2.0**-23,
)
FP16 = DataType(
    short="fp16",
    long="float16",
    numpy="float16",
    bytes=2,
    code=10,
    name="FLOAT16",
    text="tensor(float16)",
    triton="TYPE_FP16",
    masked=-3e4,
    rounding=2.0**-10,
)
BF16 = DataType(
    short="bf16",
    long="bfloat16",
    numpy=None,
    bytes=2,
    code=16,
    name="BFLOAT16",
    text="tensor(bfloat16)",
    triton="TYPE_BF16",
    on_cpu=False,
    masked=-1e30,
    rounding=2.0**-7,
)
INT64 = DataType(
    short="int64",
    long="int64",
    numpy="int64",
    bytes=8,
    code=7,
    name="INT64",
    text="tensor(int64)",
    triton="TYPE_INT64",
)
BOOL = DataType(
    short="bool",
    long="bool",
    numpy="bool",
    bytes=1,
    code=9,
    name="BOOL",
    text="tensor(bool)",
    triton="TYPE_BOOL",
)
FLOATS = (FP32, FP16, BF16)
"""The types of a model's weights."""

ALL = (*FLOATS, INT64, BOOL)


def of_name(name: str) -> DataType:
    """Return the type that ONNX calls `name`, such as `FLOAT`."""
    return next(kind for kind in ALL if kind.name == name)


def of_code(code: int) -> DataType:
    """Return the type whose number in `onnx.TensorProto.DataType` is `code`."""
    return next(kind for kind in ALL if kind.code == code)


def of_weights(name: str) -> DataType:
    """Return the type of weights with a short or a long name, such as `fp32` or `float32`.

    Raises:
        KeyError: There is no such type.
    """
    for kind in FLOATS:
        if name in (kind.short, kind.long):
            return kind
    raise KeyError(name)
