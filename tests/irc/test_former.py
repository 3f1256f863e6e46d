"""Names that version 0.1 documented can still be imported, and mean the same."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import irc
from irc.bundle.loading import open_model

# Where a name was, and where it is.
SAME = {
    "irc.bundle.load": "irc.bundle.loading.load",
    "irc.bundle.save_bundle": "irc.bundle.saving.save_bundle",
    "irc.config.Recipe": "irc.recipe.recipe.Recipe",
    "irc.config.load_recipe": "irc.recipe.recipe.load_recipe",
    "irc.data.TextSource": "irc.text.source.TextSource",
    "irc.data.load_text": "irc.text.source.load_text",
    "irc.load": "irc.bundle.loading.load",
    "irc.model.policies.Policy": "irc.recipe.policies.Policy",
    "irc.stage_recipes.LffRecipe": "irc.recipe.stages.LffRecipe",
    "irc.stage_recipes.LoraRecipe": "irc.recipe.stages.LoraRecipe",
    "irc.stage_recipes.RouterRecipe": "irc.recipe.stages.RouterRecipe",
    "irc.triton_text.TritonPythonModel": "irc.runtime.triton_backend.TritonPythonModel",
}


def found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("former", "now"), SAME.items())
def test_a_former_name_is_the_same_object(former: str, now: str) -> None:
    assert found(former) is found(now)


def test_there_is_a_test_of_every_former_module() -> None:
    folder = Path(irc.__file__).with_name("former")
    modules = {
        ".".join(("irc", *path.relative_to(folder).with_suffix("").parts))
        for path in folder.rglob("*.py")
        if path.stem != "__init__"
    }
    same = {path.rpartition(".")[0] for path in SAME}
    assert modules - same == {"irc.evaluation_run", "irc.pipeline", "irc.runtime.parity"}


def test_former_arguments_of_an_evaluation(bundle: Path, text_file: Path, bars: Any) -> None:
    evaluation_run = importlib.import_module("irc.evaluation_run")
    model = evaluation_run.open_model(str(bundle), dtype="fp32", device="cpu")
    assert type(model) is type(open_model(str(bundle)))
    found = evaluation_run.run_evaluation(
        str(bundle), bars(), data=str(text_file), split="all", tokens=64, seq_len=16, device="cpu", kv_thresholds=[0.5]
    )
    assert found["data"]["seq_len"] == 16
    assert [row["threshold"] for row in found["kv_sweep"]] == [0.5]


def test_former_arguments_of_a_verification(exported: Path, text_file: Path, bars: Any) -> None:
    parity = importlib.import_module("irc.runtime.parity")
    result = parity.verify(exported, bars(), data=str(text_file), tokens=32, seq_len=16, prompts=0, provider="cpu")
    assert result["ok"]
    assert result["data"]["tokens"] == 32


def test_former_arguments_of_a_conversion(tmp_path: Path, bars: Any) -> None:
    pipeline = importlib.import_module("irc.pipeline")
    recipe = found("irc.config.Recipe")(model=str(tmp_path / "nowhere"))
    with pytest.raises(found("irc.errors.InputError"), match="nowhere"):
        pipeline.convert(recipe, tmp_path / "b", bars(), force=True, resume=False, stages=tmp_path / "cache")


@pytest.mark.parametrize("module", ["irc", "irc.bundle", "irc.bundle.layout", "irc.model.storage", "irc.devices"])
def test_importing_it_imports_no_torch(module: str) -> None:
    program = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("module", ["irc", "irc.bundle"])
def test_other_names_are_not_there(module: str) -> None:
    with pytest.raises(AttributeError, match="nothing"):
        found(f"{module}.nothing")
