"""Formerly `irc.pipeline`, with the arguments of version 0.1; now `irc.conversion.pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irc.conversion.pipeline import convert as _convert
from irc.progress import ProgressFactory
from irc.recipe.recipe import Recipe


def convert(
    recipe: Recipe,
    output: Path,
    progress: ProgressFactory,
    *,
    force: bool = False,
    resume: bool = False,
    stages: Path | None = None,
) -> dict[str, Any]:
    """Convert a model into a bundle; `stages` is now called `stage_cache_folder`."""
    return _convert(recipe, output, progress, force=force, resume=resume, stage_cache_folder=stages)


__all__ = ["convert"]
