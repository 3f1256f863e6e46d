from __future__ import annotations

import re

import pytest
import torch

from irc.dtypes import BYTES, LONG_NAMES, short_name, torch_dtype


@pytest.mark.parametrize("name", LONG_NAMES)
def test_names_of_a_type_go_together(name: str) -> None:
    dtype = torch_dtype(name)
    assert torch_dtype(LONG_NAMES[name]) == dtype
    assert short_name(dtype) == name
    assert BYTES[name] == dtype.itemsize


@pytest.mark.parametrize("name", ["float64", "fp8", "nn", ""])
def test_other_names_are_none(name: str) -> None:
    with pytest.raises(KeyError, match=re.escape(repr(name))):
        torch_dtype(name)


def test_other_types_have_no_short_name() -> None:
    with pytest.raises(KeyError, match="float64"):
        short_name(torch.float64)
