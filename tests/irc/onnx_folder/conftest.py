"""A tiny routed bundle and ONNX folders of it and of its base. Read them, never write to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from irc.bundle import save_bundle
from irc.checkpoint import BaseModel
from irc.export import export
from irc.routed import RoutingSpec, build_routed


@pytest.fixture(scope="session")
def bundle(base: BaseModel, shake: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = shake(build_routed(base, RoutingSpec(4), "fp32"))
    model.facts["base"] = base
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    save_bundle(model, folder, {"calibration_keep": {unit.name: 0.4 for unit in model.units}})
    return folder


@pytest.fixture(scope="session")
def exported(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "routed"
    export(str(bundle), folder)
    return folder


@pytest.fixture(scope="session")
def dense(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "dense"
    export(str(model_folder), folder)
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "copied"))
