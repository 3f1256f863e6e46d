"""`irc bench`, and the forced decisions it is built on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from irc.runtime import Runtime

PROMPT = "def parse(text):\n    "


def test_forced_decisions_take_the_routers_place(exported: Path, dense: Path) -> None:
    """All executed is the dense model; the logit differences are the routers' own all the same."""
    ids, mask = np.arange(12).reshape(2, 6), np.ones((2, 6), np.int64)
    runtimes = [Runtime(dense), Runtime(exported, forced=True), Runtime(exported)]
    execute = np.ones((4, 2, 6), bool)
    plain = runtimes[0].step(ids, mask, runtimes[0].empty_cache(2))
    forced = runtimes[1].step(ids, mask, runtimes[1].empty_cache(2), execute)
    free = runtimes[2].step(ids, mask, runtimes[2].empty_cache(2))
    np.testing.assert_allclose(forced.logits, plain.logits, atol=1e-4)
    assert forced.execute is execute
    np.testing.assert_allclose(forced.difference[0], free.difference[0], atol=1e-5)
    assert 0 < free.execute.mean() < 1
    same = runtimes[1].step(ids, mask, runtimes[1].empty_cache(2), free.execute)
    np.testing.assert_allclose(same.logits, free.logits, atol=1e-5)


def test_bench_prints_what_it_measured(irc_main: Callable[..., Any]) -> None:
    sizes = "--hidden 64 --layers 1 --ffn 96 --heads 4 --kv-heads 2 --prefill 32 --past 8 --decode 2 --rounds 2".split()
    shown = irc_main("bench", "--sparsities", "0,0.5", "--provider", "cpu", "--json", *sizes)
    assert shown.code == 0, shown.err
    result = shown.json
    assert [row["sparsity"] for row in result["results"]] == [0, 0.5]
    for row in result["results"]:
        for name in ("prefill", "decode"):
            figures = row[name]
            assert figures["speedup"] == pytest.approx(figures["dense_ms"] / figures["routed_ms"])
            assert figures["efficiency"] == pytest.approx(figures["speedup"] / figures["ideal"])
    none, half = result["results"]
    assert none["prefill"]["ideal"] < 1 < half["prefill"]["ideal"]
    assert irc_main("bench", "--sparsities", "0.5,2").code == 2
    assert irc_main("bench", "--hidden", "65").code == 2
