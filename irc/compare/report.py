"""Stub."""

from pathlib import Path
from typing import Any


def write_report(results: dict[str, Any], path: Path) -> None:
    """Stub."""
