"""A forced session follows what it is told, and leaves neither a file nor a changed folder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from irc.deployment.forced import open_forced
from irc.runtime.session import Runtime

IDS, MASK = np.arange(14).reshape(2, 7), np.ones((2, 7), np.int64)


def test_every_unit_follows_what_it_is_told(exported: Path) -> None:
    """One unit at a time is told another thing than the rest, and each time the logits are others."""
    runtime = open_forced(exported, "cpu")
    units = len(runtime.exported.decisions)
    told = [np.ones((units, 2, 7), bool) for _ in range(units + 1)]
    for unit in range(units):
        told[unit][unit] = False
    found = [runtime.step(IDS, MASK, runtime.empty_cache(2), each).logits for each in told]
    assert len({logits.tobytes() for logits in found}) == units + 1


def test_told_what_the_routers_say_it_gives_what_they_give(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    free, forced = Runtime(exported, "cpu"), open_forced(exported, "cpu")
    expected = free.step(IDS, MASK, free.empty_cache(2))
    found = forced.step(IDS, MASK, forced.empty_cache(2), expected.execute)
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.difference, expected.difference)
    assert list(tmp_path.iterdir()) == []
    assert not list(exported.glob("*forced*"))


def test_a_dense_model_has_nothing_to_force(dense: Path) -> None:
    runtime = open_forced(dense, "cpu")
    assert runtime.step(IDS, MASK, runtime.empty_cache(2)).execute.shape == (0, 2, 7)
