"""Reads text from tables: .jsonl, .json, .csv and .parquet files, and datasets streamed from the Hugging Face hub.

The first row that has a known column decides which column of a table is read. A cell is text, a conversation, or empty;
anything else is refused, because its text would be one that nobody wrote.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeGuard

from irc.errors import InputError
from irc.files.untrusted import first_line

log = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "content", "document")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns of conversations: lists of messages with `role` and `content`, or with `from` and `value`."""
MOST_CHARACTERS = 1 << 29
"""How much text of a hub dataset is read; the rest is not downloaded."""

_NEEDS_DATASETS = "needs the package 'datasets'; install it with: pip install 'informed-routing-compiler[data]'"
_ROLES = {"human": "user", "gpt": "assistant"}
_MOST_ROWS_WITHOUT_COLUMN = 1000
_LONGEST_FIELD = 1 << 30


class Row(NamedTuple):
    """The text of one row.

    Attributes:
        text: The text; of a conversation, what its messages say, without the roles.
        messages: The messages of a conversation as JSON, empty for plain text.
    """

    text: str
    messages: str = ""


class NotATable(InputError):
    """A file is not a table with a column of text, although its suffix allows one."""


def json_lines_rows(path: Path, text: str) -> list[Row]:
    """Return the rows of a JSON Lines file.

    Args:
        path: Path of the file, for error messages.
        text: Content of the file.

    Raises:
        NotATable: There is no text column.
        InputError: A line is not a JSON object, or a value is not text.
    """
    return list(_rows(_json_lines(path, text), str(path), "line"))


def json_rows(path: Path, text: str) -> list[Row]:
    """Return the rows of a JSON file: a list of objects, an object that holds one such list, or an object of rows.

    Args:
        path: Path of the file, for error messages.
        text: Content of the file, which may also be JSON Lines.

    Raises:
        NotATable: The file is not JSON, or has no rows or no text column.
        InputError: A value is not text.
    """
    try:
        found = _rows_in(json.loads(text))
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            return json_lines_rows(path, text)
        raise NotATable(f"{path}: not JSON ({first_line(error)})") from error
    if found is None:
        raise NotATable(f"{path}: JSON without rows; write a list of objects, one for each text")
    return list(_rows(enumerate(found, start=1), str(path)))


def csv_rows(path: Path, text: str, delimiter: str = ",") -> list[Row]:
    """Return the rows of a .csv or .tsv file, whose first line names the columns.

    Args:
        path: Path of the file, for error messages.
        text: Content of the file.
        delimiter: What is between two fields.

    Raises:
        NotATable: There is no text column.
        InputError: A line has more fields than the first one, or its quotes do not match.
    """
    csv.field_size_limit(_LONGEST_FIELD)  # the default is 131,072 characters
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)

    def numbered() -> Iterator[tuple[int, Any]]:
        for row in reader:
            if None in row:
                raise InputError(
                    f"{path}, line {reader.line_num}: has more fields than the header; put texts into quotes"
                )
            yield reader.line_num, row

    refusal: type[InputError] = NotATable
    try:
        column = _column(reader.fieldnames or ()) or _refuse_columns(str(path), reader.fieldnames or ())
        refusal = InputError
        _refuse_twice(str(path), column, reader.fieldnames or ())
        return list(_rows(numbered(), str(path), "line"))
    except csv.Error as error:
        raise refusal(f"{path}, line {reader.reader.line_num}: {error}; put texts into quotes") from error


def parquet_rows(path: Path) -> list[Row]:
    """Return the rows of a parquet file, without reading its other columns.

    Raises:
        InputError: The file is not a parquet file, it has no text column, a value is not text, or pyarrow is not
            installed.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: {_NEEDS_DATASETS}") from error
    try:
        with parquet.ParquetFile(path) as opened:
            names = opened.schema_arrow.names
            column = _column(names) or _refuse_columns(str(path), names)
            _refuse_twice(str(path), column, names)
            values = (value for batch in opened.iter_batches(columns=[column]) for value in batch.column(0))
            return list(_rows(_parquet_values(path, column, values), str(path)))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a parquet file ({first_line(error)})") from error


def _parquet_values(path: Path, column: str, values: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    for number, value in enumerate(values, start=1):
        try:
            yield number, {column: value.as_py()}
        except UnicodeDecodeError as error:
            found = error.object[error.start : error.start + 1]
            raise InputError(
                f"{path}, row {number}, column '{column}': not UTF-8 text (byte {found!r}); convert it to UTF-8"
            ) from error


READERS: dict[str, Callable[[Path, str], list[Row]]] = {
    ".jsonl": json_lines_rows,
    ".ndjson": json_lines_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": partial(csv_rows, delimiter="\t"),
}
"""What reads the content of a table, by the file's suffix."""


def hub_rows(name: str) -> Iterator[Row]:
    """Stream the rows of a dataset's train split, at most `MOST_CHARACTERS` in total.

    When the hub cannot be reached, or must not be (`HF_HUB_OFFLINE=1`), the dataset is read from this machine's
    caches: first the one of `datasets`, then the one of the hub's client.

    Args:
        name: `NAME[:CONFIG]` on the hub, or a folder of .parquet or .jsonl files.

    Yields:
        The text of one row.

    Raises:
        InputError: The dataset could not be loaded, it has no text column, a value is not text, or the package
            `datasets` is not installed.
    """
    try:
        yield from _rows(enumerate(_streamed(name), start=1), f"hf:{name}", most=MOST_CHARACTERS)
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


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    refusal: type[InputError] = NotATable
    # Split at line feeds only: a JSON string may contain the other line separators that splitlines() honors.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # left in the middle where files with byte order marks were joined
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise refusal(f"{path}, line {number}: not JSON ({error}); write one object per line") from error
        refusal = InputError
        yield number, found


def _rows_in(found: object) -> list[Any] | None:
    """Return the rows of a JSON value, or None if it holds none."""
    if not isinstance(found, dict):
        return found if _is_table(found) else None
    if _is_row(found):
        return [found]
    values = list(found.values())
    tables = [value for value in values if _is_table(value)]
    if len(tables) == 1:
        return tables[0]
    return values if all(isinstance(value, dict) for value in values) and any(map(_is_row, values)) else None


def _is_row(value: object) -> bool:
    """Return whether a value is an object with text, and not the settings of some program."""
    return isinstance(value, dict) and isinstance(value.get(_column(value)), str | list)


def _is_table(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _rows(numbered: Iterable[tuple[int, Any]], source: str, unit: str = "row", most: float = math.inf) -> Iterator[Row]:
    """Yield the text of rows; one without text yields an empty row.

    Args:
        numbered: Number and values of each row.
        source: What errors call the table.
        unit: What the numbers count, `row` or `line`.
        most: How many characters to read.

    Raises:
        NotATable: There is no text column.
        InputError: A row is not an object, a value is not text, or most rows have none.
    """
    column, names = "", dict[str, None]()
    count = empty = size = 0
    for number, row in numbered:
        where = f"{source}, {unit} {number}"
        if not isinstance(row, dict):
            refusal = InputError if column else NotATable
            raise refusal(f"{where}: found {_described(row)}, expected an object of columns")
        if not column:
            names |= dict.fromkeys(row)
            column = _column(row)
            if not column and count == _MOST_ROWS_WITHOUT_COLUMN:
                break
        count += 1
        value = row.get(column)
        found = Row("") if value is None else _row(value, f"{where}, column '{column}'", column in CHAT_COLUMNS)
        empty += value is None
        size += len(found.text)
        if size > most:
            log.warning("%s: stopped after %d characters; the rest is not read", source, size - len(found.text))
            break
        yield found
    if not column:
        _refuse_columns(source, names)
    if 2 * empty > count:
        raise InputError(
            f"{source}: {empty} of {count} rows have no text in column '{column}'; delete them, or put all texts into "
            "one column"
        )
    if empty:
        log.warning(
            "%s: nothing is read from %d of %d rows, which have no column '%s' or null in it",
            source,
            empty,
            count,
            column,
        )


def _column(names: Iterable[str]) -> str:
    """Return the column to read, empty if none is known."""
    known = set(names)
    return next((column for column in (*TEXT_COLUMNS, *CHAT_COLUMNS) if column in known), "")


def _refuse_columns(source: str, names: Iterable[str]) -> NoReturn:
    found = ", ".join(map(str, names)) or "none"
    known = ", ".join((*TEXT_COLUMNS, *CHAT_COLUMNS))
    raise NotATable(f"{source}: no text column (found {found[:200]}); name one of the columns {known}")


def _refuse_twice(source: str, column: str, names: Sequence[str]) -> None:
    if (count := names.count(column)) > 1:
        raise InputError(f"{source}: has {count} columns '{column}'; rename all but the one to read")


def _row(value: object, where: str, is_chat: bool) -> Row:
    if not is_chat:
        if not isinstance(value, str):
            raise InputError(
                f"{where}: found {_described(value)}, expected text; write one text per row, or conversations in a "
                "column 'messages'"
            )
        return Row(_whole(value, where))
    if not isinstance(value, list):
        raise InputError(f"{where}: found {_described(value)}, expected a list of messages")
    messages = [_message(each, f"{where}, message {number}") for number, each in enumerate(value, start=1)]
    if not messages:
        return Row("")
    written = json.dumps(messages, ensure_ascii=False, default=str)
    return Row("\n\n".join(message["content"] for message in messages), _whole(written, where))


def _message(message: object, where: str) -> dict[str, Any]:
    """Return a message as chat templates read it, with `role` and `content` as text."""
    if not isinstance(message, dict):
        raise InputError(f"{where}: found {_described(message)}, expected an object with role and content")
    keys = {key: value for key, value in message.items() if value is not None}  # parquet fills absent keys with None
    if "from" in keys and "value" in keys:
        speaker = keys.pop("from")
        role = _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        keys |= {"role": role, "content": keys.pop("value")}
    role, content = keys.get("role"), keys.get("content")
    if isinstance(content, list):
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else content
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(
            f"{where}: found role {reprlib.repr(role)} and content {reprlib.repr(content)}; write both as text, or "
            "content as a list of text parts"
        )
    return keys | {"role": role, "content": content}


def _described(value: object) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


def _whole(text: str, where: str) -> str:
    """Return a text, after checking that it is Unicode: a JSON string may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise InputError(f"{where}: holds {half}, half of a character; complete or delete it") from error
    return text
