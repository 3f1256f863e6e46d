"""Finished stages by what they depend on, so that conversions that begin alike train the common part once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irc.recipe.recipe import Recipe

_COMMON = ("policy", "rank", "forecaster", "seq_len", "seed", "device", "dtype", "precision", "lff")
_FIELDS = {"lff": _COMMON, "router": (*_COMMON, "sparsity", "router")}
"""The recipe's fields that decide the result of each stage; LoRA, which nothing follows, is not kept."""


@dataclass(frozen=True)
class StageCache:
    """A folder of finished stages.

    Attributes:
        folder: Where they lie, each in a folder named by a hash.
        base: Identity of the base (see `irc.model.checkpoint`).
        text: Fingerprint of the text.
    """

    folder: Path
    base: str
    text: str

    def fetch(self, recipe: Recipe, stage: str, work: Path) -> bool:
        """Copy a finished stage into a work folder; False when none like it is here.

        Args:
            recipe: Resolved.
            stage: `lff` or `router`; any other is never here.
            work: Folder of an unfinished conversion.
        """
        found = self._place(recipe, stage)
        if found is None or not (found / f"{stage}.json").is_file():
            return False
        for name in (f"{stage}.safetensors", f"{stage}.json"):  # the last one says that the stage is finished
            shutil.copyfile(found / name, work / name)
        return True

    def store(self, recipe: Recipe, stage: str, work: Path) -> None:
        """Keep a stage that a work folder holds; whole or not at all."""
        place = self._place(recipe, stage)
        if place is None or place.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as made:
            partial = Path(made) / "stage"
            partial.mkdir()
            for name in (f"{stage}.safetensors", f"{stage}.json"):
                shutil.copyfile(work / name, partial / name)
            try:
                os.replace(partial, place)
            except OSError:  # another conversion was first
                if not place.exists():
                    raise

    def _place(self, recipe: Recipe, stage: str) -> Path | None:
        if stage not in _FIELDS:
            return None
        everything = recipe.to_dict()
        parts: dict[str, Any] = {field: everything[field] for field in _FIELDS[stage]}
        parts["reads"] = recipe.router.reads  # decides the shape of the routers, which every stage saves
        text = json.dumps({"stage": stage, "base": self.base, "text": self.text, **parts}, sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:24]
