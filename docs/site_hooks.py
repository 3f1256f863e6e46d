"""Hooks of the documentation site: they add pages from outside of docs/ and adapt the links to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = {"index.md": "README.md", "examples.md": "examples/README.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of `OUTSIDE`."""
    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages; other links become plain text."""
    source = ROOT / OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {(ROOT / path).resolve(): name for name, path in OUTSIDE.items()}
    pages |= {path.resolve(): path.name for path in (ROOT / "docs").glob("*.md")}

    def place(match: re.Match[str]) -> str:
        found = pages.get((source.parent / match[2]).resolve())
        return f"[{match[1]}]({found}{match[3] or ''})" if found else match[1]

    return _LINK.sub(place, markdown)
