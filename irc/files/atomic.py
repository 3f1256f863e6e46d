"""Atomic writes: a file or folder is written under a temporary name and renamed when it is complete."""

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

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def staged(folder: Path, remedy: str | None = None, options: tuple[str, ...] = ()) -> Iterator[Path]:
    """Write a folder atomically.

    The block fills an empty staging folder next to `folder`. When the block succeeds, the staging folder replaces
    `folder`. When it fails for any reason, the staging folder and the parents created for it are removed. Symbolic
    links are followed.

    Args:
        folder: Where the result goes. An existing folder stays intact until the new one is complete.
        remedy: What errors advise; see `cannot_write`.
        options: Parameters that the remedy needs; see `IrcError`.

    Yields:
        The staging folder.

    Raises:
        InputError: The folder cannot be written to, or it is the working folder or contains it.
        IrcError: The disk is full.
    """
    target = folder.resolve()
    check_place(folder)
    new_parents = [parent for parent in target.parents if not parent.exists()]
    # Choose the name before creating the folder, so that a signal at any moment finds what to remove.
    staging = target.with_name(f".{target.name[:80]}.{secrets.token_hex(8)}.new")
    try:
        target.exists()  # raises for an impossible name before any work is done
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        replace_folder(staging, target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(new_parents)
        if isinstance(error, OSError):
            raise cannot_write(folder, error, remedy, options) from error
        raise


def check_place(folder: Path) -> None:
    """Refuse to replace the working folder or a folder that contains it.

    Raises:
        InputError: The folder is the working folder or contains it.
    """
    if Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(
            f"{folder}: is the working folder or contains it; choose another output folder", options=("output",)
        )


def replace_folder(staging: Path, folder: Path) -> None:
    """Replace a folder by a complete one; the old folder stays intact until the moment of the rename."""
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


def find_replaced(folder: Path) -> Path | None:
    """Return the old folder that a killed `replace_folder` moved aside, or None if there is none."""
    old = sorted(folder.parent.glob(f".{folder.name[:80]}.*.old/{folder.name}"))
    return old[0] if old else None


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: write `NAME.tmp` next to it, then rename."""
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cannot_write(path: Path, error: OSError, remedy: str | None = None, options: tuple[str, ...] = ()) -> IrcError:
    """Return the error to raise for a failed write.

    Args:
        path: What was to be written.
        error: Why it failed.
        remedy: What the user can do; None for another try with more space, or another path.
        options: Parameters that the remedy needs; see `IrcError`.

    Returns:
        An `IrcError` (exit code 1) for a full disk, or an `InputError` (exit code 2) for a path that cannot be
        written.
    """
    reason = error.strerror or str(error)
    if error.errno in _DISK_FULL:
        advice = remedy or "free some space and try again"
        return IrcError(f"{path}: could not be written ({reason}); {advice}", options=options)
    if remedy is None:
        remedy, options = "choose another output path", ("output",)
    return InputError(f"{_shortened(path)}: cannot be written ({reason}); {remedy}", options=options)


def _shortened(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-40:]}"


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders that are empty; pass the innermost first."""
    for parent in folders:
        with suppress(OSError):
            parent.rmdir()
