"""Work that version 0.1 began resumes: the files of its folder are called and mean the same.

tests/data/work-v1 was left by a conversion of version 0.1 that was killed at the third step of stage router.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from irc.conversion.pipeline import convert
from irc.conversion.resume import INPUTS
from irc.model.checkpoint import find_base
from irc.recipe.recipe import load_recipe
from irc.text.source import load_text

HASHED_BY = "5.24.0"  # the version of transformers
DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where the conversion was going; the unfinished work is beside it."""
    work = shutil.copytree(DATA / "work-v1", tmp_path / "bundle.partial")
    saved = work / "recipe.yaml"
    # transformers writes the configuration that is hashed; another version of it may have more keys.
    inputs = json.loads((work / INPUTS).read_text())
    (work / INPUTS).write_text(json.dumps(inputs | {"base": find_base(str(DATA / "bundle-v1/model")).identity()}))
    text = saved.read_text().replace("MODEL", str(DATA / "bundle-v1/model"))
    saved.write_text(text.replace("TEXT", str(DATA / "bundle-v1/text.txt")))
    return tmp_path / "bundle"


def test_the_inputs_are_known_by_the_same_hashes() -> None:
    before = json.loads((DATA / "work-v1" / INPUTS).read_text())
    assert load_text(str(DATA / "bundle-v1/text.txt")).fingerprint() == before["text"]
    if transformers.__version__ == HASHED_BY:
        base = find_base(str(DATA / "bundle-v1/model"))
        assert base.identity() != before["base"]  # of fewer files
        assert base.has_identity(before["base"])


def test_it_resumes_where_it_was(output: Path, bars: Any) -> None:
    work = output.with_name("bundle.partial")
    # Texts to measure on are newer than this work, and may change when it resumes.
    recipe, progress = load_recipe(work / "recipe.yaml").model_copy(update={"yardstick_tokens": 0}), bars()
    before = json.loads((work / "lff.json").read_text())
    metrics = convert(recipe, output, progress, resume=True)
    assert metrics["stages"]["lff"] == before
    # Neither lff nor teach again; the router stage goes on at its third step.
    assert progress.names() == ["router", "threshold", "held-out text"]
    assert progress.made[0].steps == [3, 4, 5]
    assert (output / "metrics.json").is_file()
    assert not work.exists()
