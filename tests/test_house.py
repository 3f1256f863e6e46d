"""The house rule that readers meet first: no file of source, tests or pages is long."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = {".py", ".cpp", ".h", ".cu", ".md", ".j2"}
FOLDERS = ("irc", "passes", "exporters", "tests", "examples", "docs")


def test_every_file_has_under_300_lines() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in KINDS]
    paths = [path for path in paths if "build" not in path.parts]
    assert len(paths) > 200
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length >= 300} == {}
