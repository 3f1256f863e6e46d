"""The documentation site contains every page, the names on its API page exist, and it loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OUTSIDE = {"index.md", "examples.md", "changelog.md"}  # pages that docs/site_hooks.py adds
_LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"((?:https?:)?//[^\"]*)\"")


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"^  - [\w /]+: ([\w.]+\.md)$", (ROOT / ".mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted({path.name for path in DOCS.glob("*.md")} | OUTSIDE)


@pytest.mark.parametrize("name", re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
def test_what_the_api_page_names_exists_and_has_a_docstring(name: str) -> None:
    assert pkgutil.resolve_name(name).__doc__


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(ROOT / ".mkdocs.yml")]
    command += ["--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING  -" not in done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html")}
    assert {name.replace(".md", ".html") for name in OUTSIDE} <= set(pages)
    assert 'id="irc.conversion.pipeline.convert"' in pages["api.html"]
    assert [(name, found) for name, page in pages.items() for found in _LOADED.findall(page)] == []
