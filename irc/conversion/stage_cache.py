"""Finished stages, stored by what they depend on: conversions that begin alike train the common part once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irc.conversion.work_folder import finished_mark, stage_weights
from irc.recipe.recipe import Recipe
from irc.recipe.stages import stage_named, tokens_to_read


@dataclass(frozen=True)
class StageCache:
    """A folder of finished stages.

    Attributes:
        folder: Holds one folder per stage, named by a hash.
        base: Identity of the base (see `irc.model.checkpoint`).
        text: Fingerprint of the text.
    """

    folder: Path
    base: str
    text: str

    def fetch(self, recipe: Recipe, stage: str, work: Path) -> bool:
        """Copy a finished stage into a work folder, and return whether the cache has it.

        Args:
            recipe: Resolved.
            stage: Name of the stage. Stages whose result nothing else reuses (`lora`) are never in the cache.
            work: Folder of an unfinished conversion.
        """
        found = self._place(recipe, stage)
        if found is None or not finished_mark(found, stage).is_file():
            return False
        shutil.copyfile(stage_weights(found, stage), stage_weights(work, stage))
        shutil.copyfile(finished_mark(found, stage), finished_mark(work, stage))
        return True

    def store(self, recipe: Recipe, stage: str, work: Path) -> None:
        """Copy a finished stage from a work folder into the cache, atomically."""
        place = self._place(recipe, stage)
        if place is None or place.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            partial = Path(temporary) / "stage"
            partial.mkdir()
            for file in (stage_weights(work, stage), finished_mark(work, stage)):
                shutil.copyfile(file, partial / file.name)
            try:
                os.replace(partial, place)
            except OSError:
                if not place.exists():  # otherwise another conversion was faster
                    raise

    def _place(self, recipe: Recipe, stage: str) -> Path | None:
        fields = stage_named(stage).depends_on
        if not fields:
            return None
        everything = recipe.to_dict()
        parts: dict[str, Any] = {field: everything[field] for field in fields if field in everything}
        parts["tokens_to_read"] = tokens_to_read(recipe)
        parts["routers"] = recipe.router.reads, recipe.router.hidden  # their shape; every stage saves them
        text = json.dumps({"stage": stage, "base": self.base, "text": self.text, **parts}, sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:24]
