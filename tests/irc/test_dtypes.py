from __future__ import annotations

import re
import subprocess
import sys

import numpy
import onnx
import pytest
import torch

from exporters import onnx_dtypes
from exporters.onnx_dtypes import ALL, FLOATS, DataType
from irc.dtypes import BYTES, LONG_NAMES, short_name, torch_dtype


@pytest.mark.parametrize("name", LONG_NAMES)
def test_names_of_a_type_go_together(name: str) -> None:
    dtype = torch_dtype(name)
    assert torch_dtype(LONG_NAMES[name]) == dtype
    assert short_name(dtype) == name
    assert BYTES[name] == dtype.itemsize


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.short)
def test_the_table_says_what_each_library_says(kind: DataType) -> None:
    dtype = getattr(torch, kind.long)
    assert kind.bytes == dtype.itemsize
    assert kind.code == onnx.TensorProto.DataType.Value(kind.name)
    assert kind is onnx_dtypes.of_code(kind.code) is onnx_dtypes.of_name(kind.name)
    if kind.numpy is not None:
        assert onnx.helper.tensor_dtype_to_np_dtype(kind.code) == numpy.dtype(kind.numpy)
    schema = next(schema for schema in onnx.defs.get_all_schemas() if schema.name == "Identity")
    assert kind.text in schema.type_constraints[0].allowed_type_strs


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.short)
def test_limits_of_floating_types_are_those_of_torch(kind: DataType) -> None:
    limits = torch.finfo(torch_dtype(kind.short))
    assert kind.rounding == limits.eps
    assert kind.masked is not None
    assert limits.min < kind.masked < -1e4


@pytest.mark.parametrize("name", ["float64", "fp8", "nn", ""])
def test_other_names_are_none(name: str) -> None:
    with pytest.raises(KeyError, match=re.escape(repr(name))):
        torch_dtype(name)


def test_other_types_have_no_short_name() -> None:
    with pytest.raises(KeyError, match="float64"):
        short_name(torch.float64)


def test_the_table_imports_neither_torch_nor_onnx() -> None:
    program = "import sys, irc.dtypes; print({'torch', 'onnx', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
