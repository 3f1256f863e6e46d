"""Reads text from tables: .jsonl files, .parquet files, and datasets streamed from the Hugging Face hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from irc.errors import InputError
from irc.files.untrusted import first_line

log = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "content", "document")
MOST_CHARACTERS = 1 << 29
"""How much text of a hub dataset is read; the rest is not downloaded."""

_NEEDS_DATASETS = "needs the package 'datasets'; install it with: pip install 'informed-routing-compiler[data]'"


def json_texts(path: Path, text: str) -> list[str]:
    """Return the text column of a JSON Lines file.

    Args:
        path: Path of the file, for error messages.
        text: Content of the file.

    Raises:
        InputError: A line is not a JSON object, or there is no text column.
    """
    return list(_texts(_json_rows(path, text), str(path)))


def parquet_texts(path: Path) -> list[str]:
    """Return the text column of a parquet file, without reading its other columns.

    Raises:
        InputError: The file is not a parquet file, it has no text column, or pyarrow is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: {_NEEDS_DATASETS}") from error
    try:
        with parquet.ParquetFile(path) as opened:
            column = _text_column(opened.schema_arrow.names, str(path))
            values: list[object] = []
            for batch in opened.iter_batches(columns=[column]):
                values += batch.column(0).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a parquet file ({first_line(error)})") from error
    return [_text(value) for value in values]


def hub_texts(name: str) -> Iterator[str]:
    """Stream the texts of a dataset's train split, at most `MOST_CHARACTERS` in total.

    When the hub cannot be reached, or must not be (`HF_HUB_OFFLINE=1`), the dataset is read from this machine's
    caches: first the one of `datasets`, then the one of the hub's client.

    Args:
        name: `NAME[:CONFIG]` on the hub, or a folder of .parquet or .jsonl files.

    Yields:
        The text of one row.

    Raises:
        InputError: The dataset could not be loaded, it has no text column, or the package `datasets` is not installed.
    """
    size = 0
    try:
        for text in _texts(_streamed(name), f"hf:{name}"):
            if size + len(text) > MOST_CHARACTERS:
                log.warning("hf:%s: stopped after %d characters; the rest is not read", name, size)
                return
            size += len(text)
            yield text
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"hf:{name}: the dataset could not be loaded: {error}", options=("data",)) from error


def _streamed(name: str) -> Iterable[dict[str, Any]]:
    """Open the train split of a dataset, from a folder, from the hub, or from this machine's caches."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"hf:{name}: {_NEEDS_DATASETS}") from error
    dataset, _, config = name.partition(":")

    def open_rows(place: str) -> Iterable[dict[str, Any]]:
        rows: Iterable[dict[str, Any]] = load_dataset(place, config or None, split="train", streaming=True)
        return rows

    try:
        return open_rows(dataset)  # offline, this finds what an earlier load_dataset() without streaming prepared
    except Exception as error:
        folder = None if Path(dataset).exists() else _download_folder(dataset)
        if folder is not None:
            try:
                rows = open_rows(folder)
            except FileNotFoundError:  # an earlier streamed read cached the dataset's metadata without its data
                pass
            else:
                log.warning("hf:%s: using the downloaded copy, not the hub (%s)", name, first_line(error))
                return rows
        if isinstance(error, ConnectionError):
            raise InputError(
                f"hf:{name}: the hub cannot be reached and no cache on this machine holds the dataset; "
                f"on a machine with a connection run: hf download --repo-type dataset {dataset}"
            ) from error
        raise


def _download_folder(dataset: str) -> str | None:
    """Return the folder of a dataset in the cache of the hub's client, or None if it is not there."""
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(dataset, repo_type="dataset", local_files_only=True))
    except Exception:  # not downloaded, or not a valid name on the hub
        return None


def _json_rows(path: Path, text: str) -> Iterator[dict[str, Any]]:
    # Split at line feeds only: a JSON string may contain the other line separators that splitlines() honors.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}); write one object per line") from error
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, line {number}: found a {type(row).__name__}, expected an object; write one object per line"
            )
        yield row


def _texts(rows: Iterable[dict[str, Any]], source: str) -> Iterator[str]:
    """Yield the text column of rows; the first row decides which column that is."""
    remaining = iter(rows)
    first = next(remaining, {})
    column = _text_column(first, source)
    for row in chain([first], remaining):
        yield _text(row.get(column))


def _text_column(names: Iterable[str], source: str) -> str:
    known = set(names)
    for column in TEXT_COLUMNS:
        if column in known:
            return column
    raise InputError(f"{source}: no text column; name one of the columns {', '.join(TEXT_COLUMNS)}")


def _text(value: object) -> str:
    return "" if value is None else str(value)
