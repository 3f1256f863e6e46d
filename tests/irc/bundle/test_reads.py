"""A command reads every file of a bundle once, and hashes the base's weights once."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from irc.bundle.layout import ADAPTER, CARD, CONFIG, METRICS, RECIPE
from irc.cli import main
from tests.irc.forked import Forked

WEIGHTS = "model.safetensors"


def counted(arguments: list[str], folders: list[str], report: str) -> int:
    """Run the command line, and write how often it opened each file of some folders, and listed each folder."""
    seen: Counter[str] = Counter()

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and isinstance(given[0], (str, os.PathLike)):
            path = os.path.abspath(given[0])
            if path in folders or os.path.dirname(path) in folders:
                seen[path] += 1

    sys.addaudithook(watch)
    code = main(arguments)
    Path(report).write_text(json.dumps(seen))
    return code


@pytest.fixture
def reads(bundle: Path, model_folder: Path, tmp_path: Path) -> Callable[..., dict[str, int]]:
    """Give `reads(*arguments)`: how often a command opened each file of the bundle and of the base, by name."""

    def run(*arguments: str | Path) -> dict[str, int]:
        report = tmp_path / "report.json"
        folders = [str(bundle), str(model_folder)]
        process = Forked(counted, [str(each) for each in arguments], folders, str(report), folder=tmp_path / "said")
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, out + err
        found = json.loads(report.read_text())
        return {Path(path).name: count for path, count in found.items()}

    return run


@pytest.mark.parametrize("verb", ["eval", "export", "inspect", "verify"])
def test_each_file_is_read_once(
    verb: str, bundle: Path, exported: Path, reads: Callable[..., dict[str, int]], text_file: Path, tmp_path: Path
) -> None:
    short = ("--data", text_file, "--tokens", "32", "--seq-len", "16")
    arguments = {
        "eval": ("eval", bundle, *short),
        "export": ("export", bundle, "-o", tmp_path / "onnx"),
        "inspect": ("inspect", bundle),
        "verify": ("verify", exported, *short, "--prompts", "0"),
    }
    found = reads(*arguments[verb])
    once = (CONFIG, ADAPTER, RECIPE, METRICS, CARD, WEIGHTS)
    assert {name: found.get(name, 0) for name in once} == dict.fromkeys(once, 1)
    assert found[bundle.name] == 1, "the bundle is searched for links once"


def test_a_comparison_hashes_the_base_once(
    reads: Callable[..., dict[str, int]], convert_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    settings = convert_arguments(tmp_path / "out", rank=4, seq_len=16, eval_tokens=256, router__calibration_tokens=512)
    arguments = ["compare", *(word for word in settings[1:] if word not in ("--rank", "4", "--seq-len", "16"))]
    found = reads(*arguments, "--policies", "informed,static", "--sparsities", "0.3", "--kv-sweep", "0.5")
    assert found[WEIGHTS] == 1
