"""Folders are written atomically, and the files next to them are left alone."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from irc.errors import InputError, IrcError
from irc.files.atomic import cannot_write, staged
from tests.irc.forked import Forked


def write(folder: Path, text: str = "new") -> None:
    with staged(folder) as staging:
        (staging / "file").write_text(text)


def test_neighbours_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("out.new", "out.old", "out.partial", ".out.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("mine")
    write(tmp_path / "out", "first")
    write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "file").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.new", "out", "out.new", "out.old", "out.partial"]
    assert all((tmp_path / name / "thesis").read_text() == "mine" for name in ("out.new", "out.old", ".out.new"))


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(143)])
def test_a_failure_leaves_neither_the_folder_nor_its_parents(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), staged(tmp_path / "a" / "b" / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_failure_and_a_wrong_place_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(IrcError, match=r"/out: .*No space left") as caught, staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 1
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out", Path("/proc/irc-out"), tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=str(place)[:60]) as wrong:
            write(place)
        assert len(str(wrong.value)) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert cannot_write(tmp_path, OSError(errno.EACCES, "Permission denied")).exit_code == 2


def test_the_working_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for place in (Path(), tmp_path):
        with pytest.raises(InputError, match=f"^{place}: "):
            write(place)


def test_rights_are_those_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    write(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_an_export_leaves_nothing(
    tmp_path: Path, model_folder: Path, start_irc: Callable[..., Forked], number: int
) -> None:
    process = start_irc(["export", str(model_folder), "-o", str(tmp_path / "a" / "out")])
    until = time.monotonic() + 60
    while not (tmp_path / "a").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert out == ""
    assert list(tmp_path.iterdir()) == []
