"""Exported folders run where torch, transformers, peft, accelerate, onnx and onnxscript are not installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

from irc.bundle.layout import CONFIG
from irc.runtime.folder import BUNDLE_FILE
from irc.runtime.generation import Generator
from irc.runtime.session import Runtime

ROOT = Path(__file__).parents[3]
PROMPT = "def parse(text):\n    "
TRAINER = ("torch", "transformers", "peft", "accelerate", "onnx", "onnx_ir", "onnxscript", "safetensors")

SHIELDED = """
import json, sys
trainer, commands = json.loads(sys.argv[1]), json.loads(sys.argv[2])
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in trainer:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import irc.runtime.triton_backend, irc.triton_text
from irc.cli import main
print(json.dumps([main(command) for command in commands]))
"""


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def test_no_command_of_the_runtime_imports_the_trainer(exported: Path, tmp_path: Path) -> None:
    """Here they are installed, and importing one of them in this process is an error."""
    commands = [["generate", str(exported), PROMPT, "-n", "4"], ["env"], ["generate", str(tmp_path), "x"], ["--help"]]
    commands.append(["export", "demo", "-o", str(tmp_path / "onnx")])
    command = [sys.executable, "-c", SHIELDED, json.dumps(TRAINER), json.dumps(commands)]
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 0, 2, 0, 1], done.stderr
    (last,) = (line for line in done.stderr.splitlines() if "not installed" in line)
    assert re.search(rf"package ({'|'.join(TRAINER)}) is not installed", last)


def requirements(lines: list[str]) -> dict[str, str]:
    found = (re.fullmatch(r"([\w-]+)(.*)", line.partition("#")[0].strip()) for line in lines)
    return {match[1]: match[2] for match in found if match}


def test_its_requirements_are_among_those_of_the_package() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = requirements([*project["dependencies"], *project["optional-dependencies"]["cpu"]])
    stated = requirements((ROOT / "requirements-runtime.txt").read_text().splitlines())
    assert stated == {name: known[name] for name in stated}
    assert stated.keys() == {"click", "numpy", "onnxruntime", "rich", "tokenizers"}


def test_the_file_that_tells_a_bundle_is_the_bundle_s() -> None:
    """The runtime does not import irc.bundle, which needs torch."""
    assert BUNDLE_FILE == CONFIG


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with requirements-runtime.txt and the package alone."""
    place, source = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "native", "*.egg-info")
    for name in ("irc", "passes", "exporters"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    venv.create(place, with_pip=False, symlinks=True)
    scripts = sysconfig.get_path("scripts", "venv", vars={"base": str(place), "platbase": str(place)})
    python = Path(scripts) / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
    for arguments in (["-r", str(ROOT / "requirements-runtime.txt")], ["--no-deps", str(source)]):
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True, env=clean_environment(), check=False)
        if done.returncode:
            pytest.skip(f"nothing can be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.slow
def test_a_server_without_the_trainer(server: Path, exported: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(server), *arguments],
            capture_output=True,
            text=True,
            env=clean_environment(),
            cwd=tmp_path,
            check=False,
        )

    looked = f"import importlib.util as u; print([n for n in {TRAINER} if u.find_spec(n)], u.find_spec('irc').origin)"
    installed = run("-c", looked)
    assert installed.stdout.startswith("[] "), installed.stdout + installed.stderr
    assert str(ROOT) not in installed.stdout
    generated = run("-m", "irc", "generate", str(exported), PROMPT, "-n", "20", "--json")
    assert generated.returncode == 0, generated.stderr
    expected = Generator(Runtime(exported, ops="portable")).generate(PROMPT, max_tokens=20)
    assert json.loads(generated.stdout)["text"] == expected.text
    shown = run("-m", "irc", "env", "--json")
    assert shown.returncode == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert [each["usable"] for each in report["providers"] if each["name"] == "CPUExecutionProvider"] == [True]
    assert (report["versions"]["torch"], report["cpu"]["torch_threads"]) == (None, None)
    assert run("-c", "import irc.triton_text, irc.runtime.triton_backend").returncode == 0
    assert run("-m", "irc", "env").returncode == 0
    refused = run("-m", "irc", "convert", "demo", "-o", "bundle")
    assert refused.returncode == 1
    assert "is not installed" in refused.stderr
