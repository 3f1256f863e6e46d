"""Fuzzes a loader with atheris for a few seconds; `make fuzz` fuzzes all of them for longer."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="atheris has no wheel for this machine")
GUIDED = Path(__file__).with_name("guided.py")
TARGETS = runpy.run_path(str(GUIDED))["TARGETS"]
SECONDS = int(os.environ.get("IRC_FUZZ_SECONDS", "0"))
"""Seconds for each loader; 0 for the short run of the suite."""


@pytest.mark.parametrize("target", TARGETS if SECONDS else ["bundle_config"])
def test_guided(target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, str(GUIDED), target, str(tmp_path / "fuzz"), str(SECONDS or 3)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    total = json.loads((tmp_path / "fuzz" / "total.json").read_text())
    assert total["inputs"] > 100
    assert 0 < total["refused"] < total["inputs"]  # some were refused and some were not
    if SECONDS:
        with capfd.disabled():
            sys.stderr.write(f"\nguided {target}: {total['inputs']:,} inputs, {total['bytes']:,} bytes")


def test_a_loader_that_raises_something_else_is_found(tmp_path: Path) -> None:
    program = tmp_path / "broken.py"
    program.write_text(
        GUIDED.read_text()
        .replace("return folder / CONFIG, lambda: read_config(folder)", BROKEN)
        .replace("Path(__file__).parents[2]", f"Path({str(GUIDED.parents[2])!r})")
    )
    command = [sys.executable, str(program), "bundle_config", str(tmp_path / "fuzz"), "20"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0
    assert "JSONDecodeError" in run.stderr + run.stdout
    assert list((tmp_path / "fuzz").glob("crash-*"))


BROKEN = "import json; return folder / CONFIG, lambda: json.loads((folder / CONFIG).read_bytes())"
