"""Text in rows: .jsonl and .parquet files, and datasets of the hub, which are streamed."""

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
"""Of a dataset of the hub; what comes after them is not downloaded."""

_NEEDS_DATASETS = "needs the package datasets; install it with: pip install 'informed-routing-compiler[data]'"


def json_texts(path: Path, text: str) -> list[str]:
    """Return the text column of JSON lines.

    Args:
        path: For failures.
        text: The file's content.

    Raises:
        InputError: A line holds no object, or there is no text column.
    """
    return list(_texts(_json_rows(path, text), str(path)))


def parquet_texts(path: Path) -> list[str]:
    """Return the text column of a parquet file, without reading its other columns.

    Raises:
        InputError: It is no parquet file, has no text column, or pyarrow is missing.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: {_NEEDS_DATASETS}") from error
    try:
        with parquet.ParquetFile(path) as opened:
            column = _column(opened.schema_arrow.names, str(path))
            values = [row for batch in opened.iter_batches(columns=[column]) for row in batch.column(0).to_pylist()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a parquet file ({first_line(error)})") from error
    return [_text(value) for value in values]


def hub_texts(name: str) -> Iterator[str]:
    """Yield the texts of the train split of a dataset, streamed, up to `MOST_CHARACTERS` in all.

    Where the hub cannot be reached, or is not to be (`HF_HUB_OFFLINE=1`), it is read from where it lies already: what
    `datasets` has prepared on this machine, else what the hub's client has downloaded.

    Args:
        name: `NAME[:CONFIG]` on the hub, or a folder of .parquet or .jsonl files.

    Raises:
        InputError: It could not be loaded, has no text column, or the package datasets is missing.
    """
    size = 0
    try:
        for text in _texts(_streamed(name), f"--data hf:{name}"):
            if size + len(text) > MOST_CHARACTERS:
                log.warning("--data hf:%s: read up to %d characters; the rest is left out", name, size)
                return
            size += len(text)
            yield text
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--data hf:{name}: the dataset could not be loaded: {error}") from error


def _streamed(name: str) -> Iterable[dict[str, Any]]:
    """Open the train split of a dataset: of a folder or the hub, else of this machine's caches."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"--data hf:{name}: {_NEEDS_DATASETS}") from error
    dataset, _, config = name.partition(":")

    def opened(place: str) -> Iterable[dict[str, Any]]:
        rows: Iterable[dict[str, Any]] = load_dataset(place, config or None, split="train", streaming=True)
        return rows

    try:
        return opened(dataset)  # without a connection: what an earlier load_dataset() without streaming has prepared
    except Exception as error:
        folder = None if Path(dataset).exists() else _downloaded(dataset)
        if folder is not None:
            try:
                found = opened(folder)
            except FileNotFoundError:  # what streaming looks at is downloaded too, without the data
                pass
            else:
                log.warning("--data hf:%s: not from the hub but as it was downloaded (%s)", name, first_line(error))
                return found
        if isinstance(error, ConnectionError):
            raise InputError(
                f"--data hf:{name}: the hub cannot be reached, and the dataset is in no cache of this machine; "
                f"where there is a connection run: hf download --repo-type dataset {dataset}"
            ) from error
        raise


def _downloaded(dataset: str) -> str | None:
    """Return the folder of a dataset in the cache of the hub's client; None for none."""
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(dataset, repo_type="dataset", local_files_only=True))
    except Exception:  # not there, or no name that the hub could know
        return None


def _json_rows(path: Path, text: str) -> Iterator[dict[str, Any]]:
    # Only line feeds end a row: JSON strings may hold the other line ends that splitlines() knows.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}); give one object a line") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a {type(row).__name__}, not an object; give one object a line")
        yield row


def _texts(rows: Iterable[dict[str, Any]], what: str) -> Iterator[str]:
    """Yield the text column of rows; the first one says which it is."""
    left = iter(rows)
    first = next(left, {})
    column = _column(first, what)
    for row in chain([first], left):
        yield _text(row.get(column))


def _column(names: Iterable[str], what: str) -> str:
    known = set(names)
    for column in TEXT_COLUMNS:
        if column in known:
            return column
    raise InputError(f"{what}: no text column; expected one of {', '.join(TEXT_COLUMNS)}")


def _text(value: object) -> str:
    return "" if value is None else str(value)
