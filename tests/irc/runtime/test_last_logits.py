"""A text is continued from its last token's logits: no others are computed, and they are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporters.onnx_format import FIRST
from irc.runtime.generation import Generator
from irc.runtime.session import Runtime, Step


@pytest.mark.parametrize("ops", ["auto", "portable"])
def test_the_last_tokens_logits_are_those_among_all(exported: Path, dense: Path, ops: str) -> None:
    """With a prompt, a step and a few tokens more; the cache does not depend on it."""
    for folder in (exported, dense):
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        (cut,) = (node for node in graph.node if FIRST in node.input)
        assert cut.output != ["logits"], "the head of an exported model is known"
        runtime = Runtime(folder, "cpu", ops=ops)
        caches, past = (runtime.empty_cache(2), runtime.empty_cache(2)), 0
        for tokens in (9, 1, 4):
            ids, past = np.arange(2 * tokens).reshape(2, tokens) % 61, past + tokens
            mask = np.ones((2, past), np.int64)
            whole, last = (runtime.step(ids, mask, caches[part], last=bool(part)) for part in (0, 1))
            assert whole.logits.shape[:2] == (2, tokens)
            assert last.logits.shape == (2, 1, whole.logits.shape[2])
            np.testing.assert_allclose(last.logits[:, 0], whole.logits[:, -1], atol=1e-5)
            np.testing.assert_array_equal(last.execute, whole.execute)


def test_a_generator_asks_for_the_last_tokens_logits_alone(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, ...]] = []
    original: Callable[..., Step] = Runtime.step

    def step(*arguments: Any, **named: Any) -> Step:
        made = original(*arguments, **named)
        found.append(made.logits.shape[:2])
        return made

    monkeypatch.setattr(Runtime, "step", step)
    Generator(Runtime(exported)).continue_ids(list(range(10)), 3)
    assert set(found) == {(1, 1)}
