"""Folders that are not models are refused, and the error says what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from irc.errors import InputError
from irc.model.checkpoint import find_base


@pytest.mark.parametrize(("file", "what"), [("irc_config.json", "bundle"), ("irc.json", "ONNX folder")])
def test_folders_of_ours_are_named(tmp_path: Path, file: str, what: str) -> None:
    (tmp_path / file).write_text("{}")
    (tmp_path / "config.json").write_text("{}")  # ONNX folders hold one
    with pytest.raises(InputError, match=f"{tmp_path}.*{what}"):
        find_base(str(tmp_path))


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name_is_not_the_working_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="empty"):
        find_base(name)


def test_a_folder_whose_name_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mod\udce9l").mkdir()
    with pytest.raises(InputError, match=r"\udce9.*not UTF-8"):
        find_base(str(tmp_path / "mod\udce9l"))
