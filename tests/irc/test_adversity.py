"""Kills, full disks, read-only folders, a clock that goes backwards, and two runs at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from irc.bundle.config import read_config
from irc.bundle.layout import ADAPTER
from irc.bundle.saving import save_bundle
from irc.conversion import work_folder as workspace
from irc.conversion.work_folder import open_work_folder
from irc.errors import InputError, IrcError
from irc.files.atomic import staged
from irc.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
Arguments = Callable[..., list[str]]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of all files that this process writes, to simulate a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_kills_at_random_moments(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples" / "kill_and_resume.py"), str(model_folder)]
    done = subprocess.run(
        [*script, "--data", str(text_file), "--seq-len", "16", "--kills", "3", "--work", str(tmp_path / "kill")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "irc convert: 2 kills" in done.stdout
    assert "irc export: 1 kills" in done.stdout


def test_a_disk_that_is_full_while_a_stage_is_saved(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path
) -> None:
    output = tmp_path / "b"
    with largest_file(6000):
        failed = irc_main(*convert_arguments(output))
    assert failed.code == 1
    assert str(tmp_path) in failed.sentence()
    assert not output.exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert irc_main(*convert_arguments(output), "--resume").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_a_disk_that_is_full_while_an_export_is_written(irc_main: Any, model_folder: Path, tmp_path: Path) -> None:
    with largest_file(20_000):
        failed = irc_main("export", model_folder, "-o", tmp_path / "onnx")
    assert (failed.code, str(tmp_path) in failed.sentence()) == (1, True)
    assert list(tmp_path.iterdir()) == []
    assert irc_main("export", model_folder, "-o", tmp_path / "onnx").code == 0


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this process may not write to; root becomes nobody during the test."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_that_is_read_only(read_only: Path) -> None:
    with pytest.raises(OSError, match="Permission denied"):
        (read_only / "x").write_text("")
    denied = rf"{re.escape(str(read_only))}/.*Permission denied"
    with pytest.raises(InputError, match=denied), staged(read_only / "out"):
        pass
    with (
        pytest.raises(InputError, match=denied),
        open_work_folder(read_only / "b.partial", Recipe(), force=False, resume=False),
    ):
        pass
    assert list(read_only.iterdir()) == []


def test_a_clock_that_goes_backwards(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = iter(range(10**6, 0, -1))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(hours) * 3600.0)
        patch.setattr(time, "time_ns", lambda: next(hours) * 3600 * 10**9)
        done = irc_main(*convert_arguments(tmp_path / "b"))
    assert done.code == 0, done.err
    assert all(0 <= value < 600 for value in done.json["seconds"].values())
    read_config(tmp_path / "b")


@pytest.mark.slow
def test_two_converts_into_one_folder(start_irc: Any, convert_arguments: Arguments, tmp_path: Path) -> None:
    """One of them writes the bundle and the other is refused."""
    running = [start_irc(convert_arguments(tmp_path / "b")) for _ in range(2)]
    outputs = [process.communicate(timeout=500) for process in running]
    codes = [process.returncode for process in running]
    assert sorted(codes) == [0, 2], outputs
    refusal = outputs[codes.index(2)][1]
    # A moment before or after the lock is held, the second finds the unfinished or the finished bundle instead.
    assert "/b" in refusal or "b.partial" in refusal, refusal
    assert (tmp_path / "b" / "metrics.json").is_file()


def test_a_lock_file_that_goes_between_opening_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a file that its holder has just removed would not protect anything."""
    path, flock = tmp_path / "b.lock", fcntl.flock
    calls = []

    def late(opened: Any, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            path.unlink()
        flock(opened, how)

    monkeypatch.setattr(workspace.fcntl, "flock", late)
    with workspace._locked(path):
        assert path.read_text() == str(os.getpid())
        with pytest.raises(InputError, match=r"b\.lock"), workspace._locked(path):
            pass
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """As NFS and Lustre are often mounted."""

    def flock(opened: Any, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(workspace.fcntl, "flock", flock)
    with open_work_folder(tmp_path / "b.partial", Recipe(), force=False, resume=False):
        assert (tmp_path / "b.partial" / "recipe.yaml").is_file()
        (tmp_path / "b.partial" / "lff.json").write_text("{}")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert os.strerror(number) in caplog.text
    assert "b.partial.lock" in caplog.text


@pytest.mark.parametrize(
    ("filename", "raised"),
    [(None, IrcError), ("b.partial/lff.json.tmp", IrcError), ("base/model.safetensors", FileNotFoundError)],
)
def test_only_what_could_not_be_written_is_said_to_be_so(
    tmp_path: Path, filename: str | None, raised: type[Exception]
) -> None:
    error = OSError(errno.ENOENT, "No such file", *([] if filename is None else [str(tmp_path / filename)]))
    work = open_work_folder(tmp_path / "b.partial", Recipe(), force=False, resume=False)
    with pytest.raises(raised, match="No such file"), work:
        raise error


@pytest.mark.parametrize("left", [["recipe.yaml.tmp"], []])
def test_a_kill_before_the_recipe_was_written(tmp_path: Path, left: list[str]) -> None:
    work = tmp_path / "b.partial"
    work.mkdir()
    for name in left:
        (work / name).write_text("model: d")
    with open_work_folder(work, Recipe(), force=False, resume=True):
        assert [path.name for path in work.iterdir()] == ["recipe.yaml"]


def test_a_kill_while_the_work_was_removed(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = convert_arguments(tmp_path / "b")

    def half(folder: Path, **options: object) -> None:
        if (folder / "recipe.yaml").exists():
            (folder / "recipe.yaml").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workspace.shutil, "rmtree", half)
        assert irc_main(*arguments).code == 130
    assert irc_main(*arguments, "--resume").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_kill_leaves_a_bundle_whole(make_routed: Any, tmp_path: Path) -> None:
    """A save that is killed at any of its writes leaves the old or the new bundle, or an error that names the old."""
    model = make_routed()
    save_bundle(model, tmp_path / "b")
    before = (tmp_path / "b" / ADAPTER).read_bytes()
    for number in range(12):
        pid = os.fork()
        if not pid:
            _killed_at(number, lambda: save_bundle(model, tmp_path / "b"))
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            break
        if (tmp_path / "b").exists():
            assert (tmp_path / "b" / ADAPTER).read_bytes() == before
            read_config(tmp_path / "b")
            assert json.loads((tmp_path / "b" / "metrics.json").read_text()) == {}
        else:
            with pytest.raises(InputError, match=r"\.b\..*\.old"):
                read_config(tmp_path / "b")
            (old,) = tmp_path.glob(".b.*.old/b")
            os.replace(old, tmp_path / "b")
    assert number > 3, "no write was hit"


def _killed_at(number: int, work: Callable[[], object]) -> None:
    """Run `work` in this process, and die by SIGKILL at a given write or rename."""
    left = [number]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" or (event == "open" and str(arguments[1])[:1] in "wa" and arguments[1]):
            if not left[0]:
                os.kill(os.getpid(), 9)
            left[0] -= 1

    sys.addaudithook(watch)
    work()
    os._exit(0)
