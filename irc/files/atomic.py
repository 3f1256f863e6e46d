"""Folders that are written whole or not at all: beside their place, then renamed; what lies there is not touched."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from irc.errors import InputError, IrcError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside another, which takes its place when the block ends well.

    A symbolic link is followed. When the block fails, in whatever way, neither the new folder nor parents that were
    made for it stay.

    Args:
        folder: Where the result goes; what is there already stays whole until the new one is complete.

    Raises:
        InputError: The place cannot be written to, or is the working folder.
        IrcError: The disk is full.
    """
    place = folder.resolve()
    check_place(folder)
    made = [parent for parent in place.parents if not parent.exists()]
    # Named before it is made, so that a signal at any moment finds what to remove; no two names are alike.
    staging = place.with_name(f".{place.name[:80]}.{secrets.token_hex(8)}.new")
    try:
        place.exists()  # the name must be possible before any work is done
        place.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        replace_folder(staging, place)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        _remove(made)
        if isinstance(error, OSError):
            raise cannot_write(folder, error) from error
        raise


def check_place(folder: Path) -> None:
    """Refuse the working folder, and what holds it, as a place that is replaced.

    Raises:
        InputError: It is.
    """
    if Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"{folder}: is the working folder or holds it; give a folder inside it by --output")


def replace_folder(staging: Path, folder: Path) -> None:
    """Put a complete folder in the place of another; the old one is whole until the moment of the rename."""
    if not folder.exists():
        os.replace(staging, folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:80]}.", suffix=".old", dir=folder.parent))
    old = aside / folder.name
    os.replace(folder, old)
    try:
        os.replace(staging, folder)
    except BaseException:
        os.replace(old, folder)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def replaced(folder: Path) -> Path | None:
    """Return the folder that a killed `replace_folder` left aside, None where there is none."""
    found = sorted(folder.parent.glob(f".{folder.name[:80]}.*.old/{folder.name}"))
    return found[0] if found else None


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all: into `NAME.tmp` beside it, then renamed."""
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cannot_write(path: Path, error: OSError) -> IrcError:
    """Return the error of a write that failed: exit code 1 for a full disk, 2 for a place that cannot be written."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return IrcError(f"{path}: could not be written ({reason}); free some space and try again")
    return InputError(f"{_short(path)}: cannot be written ({reason}); give another --output")


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-40:]}"


def _remove(parents: list[Path]) -> None:
    """Remove folders that were made, the innermost first, where they are empty."""
    for parent in parents:
        with suppress(OSError):
            parent.rmdir()
