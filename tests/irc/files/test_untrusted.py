"""What is said of files that others wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from irc.bundle.layout import ADAPTER
from irc.bundle.loading import read_adapter
from irc.errors import InputError
from irc.files.untrusted import check_pulled, first_line, read_json

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c\nsize 9\n"


def test_a_pointer_is_not_read_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(POINTER)
    (tmp_path / ADAPTER).write_text(POINTER)
    with pytest.raises(InputError, match=r"a\.json.*git lfs pull"):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match=rf"{ADAPTER}.*git lfs pull"):
        read_adapter(tmp_path, "0")


@pytest.mark.parametrize("content", [b"", b"version", b"\x00" * 100, POINTER.encode()[1:]])
def test_other_files_are_no_pointers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    check_pulled(tmp_path / "a")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("one\ntwo", "one"),
        ("Error for field 'a':\n    TypeError: expected int\nmore", "Error for field 'a': TypeError: expected int"),
        ("reason:", "reason:"),
        ("", "ValueError"),
    ],
)
def test_the_line_of_an_error_has_its_reason(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line
    assert first_line(ValueError(message), 3) == line[:3]
