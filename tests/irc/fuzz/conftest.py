"""Mutates files and feeds them to a loader, which must load or refuse them quickly and with little memory."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from irc.errors import InputError

BUDGET = int(os.environ.get("IRC_FUZZ_BYTES", "0"))
"""Bytes of mutated input for each loader; 0 for the short run of the suite, with the same inputs every time."""

SHORT, LEAST = 120, 500
SECONDS, MEGABYTES = 20.0, 400.0
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 0.5, 1e308, float("nan"), float("inf"), 10**12, 10**30, 2**31, 2**63),
    *("", "x", "../x", "/etc/hostname", "\0", "a" * 300, "é\ud800", [], {}, [[]], [None], {"x": 1}, "demo", "org/name"),
]
TOKENS = [
    *(b"NaN", b"-1", b"1e999", b"9" * 30, b"9" * 5000, b"null", b"{}", b"[]", b'"', b"[" * 3000, b'{"a":' * 3000),
    *(b"\xff\xfe", b"\0", b"\n", b": ", b"- ", b"&a [*a]", b"*a", b"!!python/object:os.system x", b"? ", b"2001-02-31"),
    *(b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"0x" + b"f" * 6000, b"<<: ", b"1:99:99", b"!!int ''", b"!!timestamp x"),
]
Edits = list[tuple[int, int, int]]


def mutate_bytes(original: bytes, edits: Edits, reach: int) -> bytes:
    """Apply edits (kind, place, value) to the first `reach` bytes."""
    data = bytearray(original)
    for kind, place, value in edits:
        at = place % max(1, min(len(data), reach))
        span = 1 + value % 64
        match kind % 7:
            case 0:
                data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ (1 << value % 8)])
            case 1:
                data[at : at + 1] = bytes([value % 256])
            case 2:
                del data[at:]
            case 3:
                del data[at : at + span]
            case 4:
                data[at:at] = data[at : at + span]
            case 5:
                data[at:at] = TOKENS[value % len(TOKENS)]
            case 6:
                token = TOKENS[value % len(TOKENS)]
                data[at : at + len(token)] = token
    return bytes(data)


def mutate_json(original: bytes, edits: Edits) -> bytes:
    """Apply edits to the tree of a JSON file: other values, and keys that are removed, renamed or duplicated."""
    tree = json.loads(original)
    duplicate = ""
    for kind, place, value in edits:
        places = list(_places(tree))
        if not places:
            break
        holder, key = places[place % len(places)]
        match kind % 5:
            case 0 | 1:
                holder[key] = copy.deepcopy(VALUES[value % len(VALUES)])
            case 2:
                del holder[key]
            case 3 if isinstance(holder, dict):
                holder[f"{key}x"] = holder.pop(key)
            case 4 if isinstance(tree, dict):
                duplicate = f"{json.dumps(next(iter(tree), 'x'))}: {json.dumps(VALUES[value % len(VALUES)])},"
            case _:
                holder[key] = [holder[key]] * (1 + value % 3)
    return ("{" + duplicate + json.dumps(tree)[1:]).encode() if duplicate and tree else json.dumps(tree).encode()


def _places(tree: Any) -> Any:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


@dataclass
class Fuzz:
    """Feeds mutated files to a loader.

    Attributes:
        name: Name of the loader.
        show: Prints a line, bypassing pytest's capture.
    """

    name: str
    show: Callable[[str], None]

    def __call__(self, path: Path, load: Callable[[], object], reach: int | None = None) -> None:
        """Feed mutations of a file to a loader.

        Args:
            path: The file; restored afterwards.
            load: Loads the file.
            reach: Bytes from the beginning that edits may change; all if None.
        """
        original = path.read_bytes()
        structured = path.suffix == ".json"
        inputs = read = refused = loaded = 0
        slowest = 0.0
        peak = _reset_peak()
        examples = max(LEAST, BUDGET // max(1, len(original) // 2)) if BUDGET else SHORT
        edits = st.lists(
            st.tuples(st.integers(0, 34), st.integers(0, 2**24), st.integers(0, 2**16)), min_size=1, max_size=4
        )

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=not BUDGET,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(edits=edits, tree=st.booleans())
        def feed(edits: Edits, tree: bool) -> None:
            nonlocal inputs, read, refused, loaded, slowest
            if tree and structured:
                data = mutate_json(original, edits)
            else:
                data = mutate_bytes(original, edits, reach or len(original))
            path.write_bytes(data)
            inputs, read = inputs + 1, read + len(data)
            began = time.monotonic()
            try:
                load()
            except InputError as error:
                refused += bool(str(error).strip())
            else:
                loaded += 1
            assert loaded + refused == inputs, "a refusal without a sentence"
            slowest = max(slowest, time.monotonic() - began)
            assert slowest < SECONDS, f"{slowest:.1f} s for one input"

        started = time.monotonic()
        try:
            rounds = 0
            while not rounds or (BUDGET and read < BUDGET):
                feed()
                rounds += 1
        finally:
            path.write_bytes(original)
        grown = _peak() - peak
        self.show(
            f"{self.name}: {inputs:,} inputs, {read:,} bytes, {time.monotonic() - started:.1f} s, {refused:,} refused, "
            f"slowest {slowest:.2f} s, {grown:.0f} MB more"
        )
        assert grown < MEGABYTES
        load()


def _peak() -> float:
    """Return the peak resident memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def _reset_peak() -> float:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Fuzz:
    """Give `fuzz(path, load)`. With a budget, it prints a line of figures."""

    def show(line: str) -> None:
        if BUDGET:
            with capsys.disabled():
                sys.stderr.write(f"\n{line}")

    return Fuzz(request.node.name.removeprefix("test_"), show)
