"""A tiny routed bundle and its ONNX folder. Read them, never write to them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from irc.bundle import save_bundle
from irc.export import export
from irc.model.build import build_routed
from irc.model.checkpoint import BaseModel
from irc.model.routed import RoutingSpec


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


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "copied"))


@pytest.fixture(scope="session")
def installed(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Give `installed(name, packages, dependencies)`: a folder for PYTHONPATH, or the test is skipped."""

    def install(name: str, packages: list[str], dependencies: tuple[str, ...] = ()) -> Path:
        folder = Path(request.config.cache.mkdir(f"runtime-{name}-{sys.version_info.minor}"))
        wanted = json.dumps([packages, dependencies])
        stamp = folder / "installed"
        if stamp.is_file() and stamp.read_text() == wanted:
            return folder
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade", "--target", str(folder)]
        commands = [[*pip, "--no-deps", *packages], *([[*pip, *dependencies]] if dependencies else [])]
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{name} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        stamp.write_text(wanted)
        return folder

    return install
