"""The distribution: the contents of wheel and sdist, and that the installed wheel works from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest

import irc

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PACKAGES = ("irc", "passes", "exporters")
BUILT_FROM = (
    *("pyproject.toml", "README.md", "CHANGELOG.md", "MANIFEST.in", "Makefile", "requirements-runtime.txt"),
    *(".gitignore", ".mkdocs.yml", ".ci", "docs"),
)
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*_cache")
SHORT = (
    "lff.tokens=256 lff.steps=1 lff.batch_size=1 router.teach_steps=1 router.steps=1 router.batch_size=1 "
    "router.calibration_tokens=256 eval_tokens=64 yardstick_tokens=0"
).split()
Run = Callable[..., subprocess.CompletedProcess[str]]


def files_of_package(name: str) -> set[str]:
    """Return every file of a package that a user needs, by its path in the repository."""
    paths = (path for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    relative = {path.relative_to(ROOT).as_posix() for path in paths}
    return {path for path in relative if not path.startswith("exporters/native/")}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the sdist: IRC_PACKAGE if it is set, or a build from a copy."""
    if os.environ.get("IRC_PACKAGE"):
        return Path(os.environ["IRC_PACKAGE"]).resolve()
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("package")
    for name in (*PACKAGES, *BUILT_FROM, "examples", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=IGNORED)
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--outdir", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Give `installed(program, *arguments)`, which runs a program in a new environment and an empty folder.

    The environment contains only the wheel. A .pth file makes torch and the other dependencies of this environment
    visible, but not editable installs.
    """
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, with_pip=False, symlinks=True)
    paths = {"base": str(place), "platbase": str(place)}
    own = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (own / "seen.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = Path(sysconfig.get_path("scripts", "venv", vars=paths)) / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--ignore-installed", str(wheel)], check=True, timeout=120)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "IRC_PACKAGE")}

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(python.with_name(program)), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=500, check=False, cwd=elsewhere, env=environment
        )

    return run


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == set().union(*map(files_of_package, PACKAGES))
    assert {f"{name}/py.typed" for name in PACKAGES} <= held
    assert {"irc/demo/model.safetensors", "irc/demo/tokenizer.json", "irc/views/routes.html.j2"} <= held
    assert any(name.startswith("irc/recipe/ready/") and name.endswith(".yaml") for name in held)


def test_the_metadata_say_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Version"] == irc.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert str(metadata.get_payload()).startswith("# irc")


def test_the_source_distribution_holds_the_whole_tree(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = set().union(*map(files_of_package, PACKAGES), BUILT_FROM)
    for folder in ("docs", "examples", "tests", "exporters/native"):
        found = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py", ".cpp", ".h", ".txt")]
        needed |= {path.relative_to(ROOT).as_posix() for path in found if "build" not in path.parts}
    assert sorted(needed - held) == []


def test_the_installed_wheel_converts_and_inspects(installed: Run, tmp_path: Path) -> None:
    done = installed("irc", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"irc, version {irc.__version__}"), done.stderr
    done = installed("python", "-c", "import irc, passes, exporters; print(irc.__file__, exporters.__file__)")
    assert str(ROOT) not in done.stdout, "the tree was imported, not the wheel"
    assert done.stdout.count("site-packages") == 2, done.stderr

    text = tmp_path / "text"
    text.mkdir()
    for index in range(30):
        lines = (f"def f{number}(x):\n    return x + {index * number}\n" for number in range(40))
        (text / f"part{index}.py").write_text("\n".join(lines))
    flags = [flag for setting in SHORT for flag in ("--set", setting)]
    given = ["--data", str(text), "--seq-len", "32", "--device", "cpu", "--json"]
    done = installed("irc", "convert", "demo", "-o", "bundle", *given, *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["perplexity"]["routed"] > 1
    done = installed("irc", "inspect", "bundle", "--json")
    assert done.returncode == 0, done.stderr
    units = json.loads(done.stdout)["units"]
    assert len(units) == 16
    assert {unit["rank"] for unit in units} == {25, 50}
    done = installed("irc", "convert", "--recipe", "llama-3.2-1b-25", "-o", "other", "--set", "seed=-x")
    assert done.returncode == 2, done.stderr  # the ready recipe was found, and the seed was refused
    assert "seed" in done.stderr
