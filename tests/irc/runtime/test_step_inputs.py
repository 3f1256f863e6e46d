"""What `Runtime.step` takes for ids and masks; anything else is refused in a sentence, before ONNX Runtime sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from irc.errors import InputError
from irc.runtime.session import Runtime

IDS = np.arange(12).reshape(2, 6)
MASK = np.ones((2, 6), np.int64)


@pytest.fixture(scope="module")
def runtimes(exported: Path, dense: Path) -> list[Runtime]:
    return [Runtime(exported, "cpu"), Runtime(dense, "cpu")]


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "int32", "uint32", "uint64", ">i8"])
def test_whole_numbers_of_every_type_are_the_same_ids(runtimes: list[Runtime], kind: str) -> None:
    for runtime in runtimes:
        expected = runtime.step(IDS, MASK, runtime.empty_cache(2)).logits
        for mask in (MASK.astype(kind), MASK.astype(bool)):
            found = runtime.step(IDS.astype(kind), mask, runtime.empty_cache(2)).logits
            np.testing.assert_array_equal(found, expected)


WRONG: dict[str, tuple[Any, Any, str]] = {
    "floats": (
        IDS.astype(np.float32),
        MASK,
        r"ids: given float32 \[2, 6\], expected .* whole numbers \[batch, tokens\]",
    ),
    "truths": (IDS > 3, MASK, "ids: given bool"),
    "objects": (IDS.astype(object), MASK, "ids: given object"),
    "one dimension": (IDS[0], MASK[:1], r"ids: given int64 \[6\]"),
    "three dimensions": (IDS[None], MASK, r"ids: given int64 \[1, 2, 6\]"),
    "a number": (np.int64(3), MASK, "ids: given int64"),
    "a list": (IDS.tolist(), MASK, "ids: given list"),
    "a tensor": (torch.from_numpy(IDS), MASK, "ids: given Tensor"),
    "a mask of floats": (IDS, MASK.astype(np.float64), r"mask: given float64 \[2, 6\], .* \[batch, cached \+ tokens\]"),
    "a mask of four dimensions": (IDS, MASK[:, None, None], r"mask: given int64 \[2, 1, 1, 6\]"),
    "no mask": (IDS, None, "mask: given NoneType"),
    "an id past the vocabulary": (IDS + 246, MASK, "ids hold 257; the model's vocabulary has the ids 0 to 256"),
    "a negative id": (IDS - 1, MASK, "ids hold -1; the model's"),
    "an id that is no int64": (np.full((2, 6), 2**63, np.uint64), MASK, "ids hold 9223372036854775808; "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_none_of_them_is_refused(runtimes: list[Runtime], name: str) -> None:
    ids, mask, sentence = WRONG[name]
    for runtime in runtimes:
        cache = runtime.empty_cache(2)
        with pytest.raises(InputError, match=sentence):
            runtime.step(ids, mask, cache)
        assert cache.length == 0
        runtime.step(IDS, MASK, cache)  # it goes on


def test_the_last_id_of_the_vocabulary_is_one(runtimes: list[Runtime]) -> None:
    for runtime in runtimes:
        assert runtime.step(IDS + 245, MASK, runtime.empty_cache(2)).logits.shape == (2, 6, 257)
