"""Reads files that others wrote: checks sizes before reading, and keeps names and links inside their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from irc.errors import InputError

MOST_TEXT = 1 << 26
"""Largest configuration file that is read, in bytes. The largest known one, a tokenizer.json, has half as many."""

_MAX_DIGITS = 400
_POINTER = b"version https://git-lfs.github.com/spec/"
_LINKED_FOLDERS = ("additional_chat_templates",)


def read_text(path: Path) -> str:
    """Return a configuration file's text.

    Args:
        path: Path of the file.

    Raises:
        InputError: The file is a Git LFS pointer.
        ValueError: The file is larger than `MOST_TEXT` bytes, or not UTF-8.
    """
    size = path.stat().st_size
    if size > MOST_TEXT:
        raise ValueError(f"the file has {size} bytes; at most {MOST_TEXT} are read")
    text = path.read_text(encoding="utf-8")
    check_pulled_text(path, text)
    return text


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: Path of the file.

    Raises:
        ValueError: The file is too large, is not valid JSON, is nested too deeply, has a duplicate key, or does not
            contain an object.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> dict[str, Any]:
    """Return the object in a JSON text.

    Args:
        text: Content of a file.

    Raises:
        ValueError: It is not valid JSON, is nested too deeply, has a duplicate key, or does not contain an object.
    """
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, found {type(found).__name__}")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; at most {_MAX_DIGITS} are read")
    return int(digits)


def check_pulled_text(path: Path, text: str) -> None:
    """Refuse a Git LFS pointer, given what was read from a file: nothing is opened for any other text."""
    if text.startswith(_POINTER.decode()):
        check_pulled(path)


def check_pulled(path: Path) -> None:
    """Refuse a Git LFS pointer, which a clone without Git LFS leaves in the place of a large file.

    Args:
        path: Path of the file.

    Raises:
        InputError: The file is such a pointer.
    """
    with path.open("rb") as opened:
        head = opened.read(len(_POINTER))
    if head == _POINTER:
        raise InputError(f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull in its folder")


def check_links(folder: Path) -> None:
    """Refuse a folder that contains a symbolic link to something outside of it.

    A snapshot in the Hugging Face cache may link to the blobs of the same model.

    Args:
        folder: Folder of a model, a bundle or an export; it may be a link itself.

    Raises:
        InputError: A link leads out of the folder.
    """
    real = folder.resolve()
    allowed = [real]
    if real.parent.name == "snapshots":
        allowed.append(real.parent.parent / "blobs")
    paths = list(folder.iterdir())
    for name in _LINKED_FOLDERS:
        paths += (folder / name).glob("*")
    for path in paths:
        if not path.is_symlink() or (path.is_dir() and path.name not in _LINKED_FOLDERS):
            continue
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # the links form a circle
            target = Path("/")
        if not any(target.is_relative_to(place) for place in allowed):
            raise InputError(f"{path}: is a link that leads out of its folder; replace it by the file itself")


def check_plain(name: Any, where: Path) -> str:
    """Return a file name that was read from a file, after checking that it names a file in the same folder.

    Args:
        name: The name as it was read.
        where: The file that it was read from.

    Raises:
        InputError: The name is not text, or it is a path to another folder.
    """
    if (
        not isinstance(name, str)
        or len(name.encode(errors="replace")) > 255
        or name in ("", ".", "..")
        or "\0" in name
        or Path(name).name != name
        or "\\" in name
    ):
        raise InputError(f"{where}: names the file {_short(name)}; give the plain name of a file in the same folder")
    return name


def first_line(error: BaseException, most: int = 200) -> str:
    """Return the first line of an exception's message, or its class name if the message is empty.

    If that line ends with a colon, the line after it, which has the reason, is joined to it.

    Args:
        error: The exception.
        most: Longest result, in characters.
    """
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    reason = f" {others[0].strip()}" if first.endswith(":") and others else ""
    return f"{first}{reason}"[:most]


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"duplicate key {_short(key)}")
        mapping[key] = value
    return mapping
