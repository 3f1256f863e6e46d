"""Files that others wrote: their size before their content, names that stay inside their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from irc.errors import InputError

MOST_TEXT = 1 << 26
"""Bytes of a configuration file; the largest that we know, tokenizer.json, has half as many."""

_MOST_DIGITS = 400
_LINKED_FOLDERS = ("additional_chat_templates",)


def read_text(path: Path) -> str:
    """Return a configuration file's text.

    Args:
        path: Of a file.

    Raises:
        ValueError: It is larger than any such file, or not UTF-8.
    """
    size = path.stat().st_size
    if size > MOST_TEXT:
        raise ValueError(f"{size} bytes, where at most {MOST_TEXT} are read")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of ours, in which no key is there twice.

    Args:
        path: Of a file.

    Raises:
        ValueError: It is too large, no JSON, nested too deeply, has a key twice, or holds no object.
    """
    try:
        found = json.loads(read_text(path), object_pairs_hook=_object, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, found {type(found).__name__}")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def check_links(folder: Path) -> None:
    """Refuse a folder that holds a symbolic link to something outside of it.

    Links of a snapshot in the Hugging Face cache, which lead to the blobs of the same model, are inside.

    Args:
        folder: Of a model, a bundle or an export; it may be a link itself.

    Raises:
        InputError: Names the link.
    """
    real = folder.resolve()
    homes = [real]
    if real.parent.name == "snapshots":
        homes.append(real.parent.parent / "blobs")
    for path in [*folder.iterdir(), *(path for name in _LINKED_FOLDERS for path in (folder / name).glob("*"))]:
        if not path.is_symlink() or (path.is_dir() and path.name not in _LINKED_FOLDERS):
            continue
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # a circle
            target = Path("/")
        if not any(target.is_relative_to(home) for home in homes):
            raise InputError(f"{path}: is a link that leads out of its folder; put the file itself there")


def check_plain(name: Any, where: Path) -> str:
    """Return a file's name that another file holds, where it is the name of a file beside it.

    Args:
        name: As it was read.
        where: The file that it was read from.

    Raises:
        InputError: It is no text, or leads elsewhere.
    """
    if (
        not isinstance(name, str)
        or len(name.encode(errors="replace")) > 255
        or name in ("", ".", "..")
        or "\0" in name
        or Path(name).name != name
        or "\\" in name
    ):
        raise InputError(f"{where}: names the file {_short(name)}, which is not beside it; only plain names are read")
    return name


def first_line(error: BaseException, most: int = 200) -> str:
    """Return the first line of an exception's text, its kind where there is none; at most `most` characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"key {_short(twice)} is there twice")
    return found
