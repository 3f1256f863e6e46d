"""Loads text, splits it, and cuts it into the windows of tokens that training and evaluation read.

A source is a list of named documents. Hashes of names and offsets decide the splits (of the model's own text, turns),
not a random generator, so every command sees the same held-out text.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import math
import os
import sysconfig
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, cycle
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from irc.errors import InputError
from irc.files.untrusted import check_pulled, check_pulled_text, first_line
from irc.text.rows import MOST_CHARACTERS, READERS, NotATable, Row, hub_rows, parquet_rows

log = logging.getLogger(__name__)

OWN_TEXT = "self"
"""How the setting `data` calls the model's own text."""

Split = Literal["train", "calibration", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "validation", "heldout")
_REQUIRED_SPLITS = frozenset({"train", "calibration", "heldout"})

TEXT_SUFFIXES = frozenset(".txt .md .rst .py .js .ts .c .h .cpp .java .go .rs .tex .html .xml .yaml .yml .toml".split())
TABLE_SUFFIXES = frozenset([*READERS, ".parquet"])

_ALWAYS_TABLES = frozenset([".jsonl", ".ndjson", ".parquet"])  # the other suffixes may also name something else
_UNPACKED_BY = {
    ".zst": "zstd -d",
    ".xz": "xz -d",
    ".bz2": "bzip2 -d",
    ".lz4": "lz4 -d",
    ".zip": "unzip",
    ".tar": "tar -xf",
    ".tgz": "tar -xf",
    ".zstd": "zstd -d",
    ".7z": "7z x",
    ".rar": "unrar x",
}
_AN_ARROW_FILE = "an Arrow file; write its rows with Dataset.to_parquet() or to_json()"
_BEGINS_WITH = {
    b"\x1f\x8b": "packed by gzip; end its name with .gz",
    b"\x28\xb5\x2f\xfd": "packed; unpack it first: zstd -d",
    b"\xfd7zXZ": "packed; unpack it first: xz -d",
    b"PK\x03\x04": "a zip archive or a document of an office program; write its texts to a .txt or .jsonl file",
    b"%PDF": "a PDF document; write its text to a .txt file",
    b"PAR1": "a parquet file; end its name with .parquet",
    b"ARROW1": _AN_ARROW_FILE,
    b"\xff\xff\xff\xff": _AN_ARROW_FILE,
}
"""What a file is that begins with other bytes than text, and what to do."""
_ARROW = ".arrow"  # of Dataset.save_to_disk()
_ABOUT_A_DATASET = ("readme", "license", "licence", "notice", "citation", "changelog")
_BLOCK_CHARACTERS, _LEAST_BLOCK_CHARACTERS = 4096, 256
_STDLIB_SKIPPED = frozenset("site-packages dist-packages encodings pydoc_data __pycache__".split())
_STDLIB_TESTS = frozenset("test tests idle_test".split())


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that `token_stream` uses."""

    eos_token_id: int | None

    def __call__(self, text: str, /, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """Return a dict whose `input_ids` are the token ids of a text."""
        ...


@dataclass(frozen=True)
class Document:
    """A piece of text, and its name, which decides its split unless its source says otherwise.

    Attributes:
        name: Name of the file, and number of the row or block.
        text: The text; of a conversation, what its messages say, without the roles.
        messages: The messages of a conversation as JSON, which `token_ids` renders; empty for plain text.
    """

    name: str
    text: str
    messages: str = ""


@dataclass(frozen=True)
class TextSource:
    """Documents from one place, with stable splits.

    Attributes:
        name: The source as the user named it (a path, `stdlib`, `hf:NAME`).
        documents: The documents, in a stable order.
        turns: Splits that the documents take in turn; empty where names decide.
    """

    name: str
    documents: tuple[Document, ...]
    turns: tuple[Split, ...] = ()

    def split(self, split: Split) -> list[Document]:
        """Return the documents of one split.

        Without turns, one document in ten is `heldout`, one in twenty is `calibration`, one in twenty is `validation`,
        and all others are `train` (see `split_of`).
        """
        if self.turns:
            mine = cycle(turn == split for turn in self.turns)
            return list(compress(self.documents, mine))
        return [document for document in self.documents if split_of(document.name) == split]

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names, texts, messages and turns, in hexadecimal; the same if all are the same."""
        digest = hashlib.sha256("".join(self.turns).encode())
        for document in self.documents:
            for part in (document.name, document.messages or document.text):
                encoded = part.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
        return digest.hexdigest()


def split_of(name: str) -> Split:
    """Return the split of a document name: 80 % train, 5 % calibration, 5 % validation, 10 % held out.

    Numbered pieces of one file (`name#3`) are assigned in turn, so a file of three pieces has train, calibration and
    held-out text. All other names are assigned by their SHA-256. Figures are reported on held-out text, thresholds are
    set on calibration text, and settings are chosen on validation text.
    """
    _, mark, number = name.rpartition("#")
    if mark and number.isdecimal():
        turn = int(number) - 1
        bucket, half = turn % 10, turn // 10 % 2
    else:
        digest = _digest(name)
        bucket, half = int.from_bytes(digest[:8], "big") % 10, 1 - digest[8] % 2
    if bucket == 1:
        return "validation" if half else "calibration"
    return "heldout" if bucket == 0 else "train"


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()


def load_text(spec: str) -> TextSource:
    """Load the text that the setting `data` names.

    Args:
        spec: `stdlib`, `stdlib-tests`, `hf:NAME[:CONFIG]` (streamed, see `irc.text.rows`), a text file, a table with
            a column of text or conversations, or a folder of such files. Files may be packed by gzip.

    Raises:
        InputError: The source does not exist, is not text, or is empty.
    """
    if not spec.strip():
        raise InputError("the text's name is empty; give a path, 'stdlib' or 'hf:NAME'", options=("data",))
    if any("\ud800" <= letter <= "\udfff" for letter in spec):
        raise InputError(f"{spec}: the path is not UTF-8, so that no file can name it; rename it", options=("data",))
    if spec == OWN_TEXT:
        raise InputError(
            f"{spec}: is the model's own text, which irc convert, compare, eval and bench alone read; give a path, "
            "'stdlib' or 'hf:NAME'",
            options=("data",),
        )
    if spec == "stdlib":
        documents = list(_stdlib_documents(tests=False))
    elif spec == "stdlib-tests":
        documents = list(_stdlib_documents(tests=True))
    elif spec == "hf:":
        raise InputError("hf:: the name of the dataset is missing; write hf:NAME", options=("data",))
    elif spec.startswith("hf:"):
        rows = list(hub_rows(spec[3:]))
        if any(row.messages for row in rows):
            documents = _numbered(spec, rows)
        else:
            documents = _blocks(spec, "\n\n".join(row.text for row in rows))
    else:
        path = Path(spec)
        if path.is_dir():
            documents = _in_every_split(_folder_documents(path))
        elif path.is_file():
            documents = _file_documents(path, path.name)
        else:
            raise InputError(f"{spec}: no such file or folder; give a path, 'stdlib' or 'hf:NAME'", options=("data",))
    if not any(document.text.strip() for document in documents):
        raise InputError(f"{spec}: contains no text; give a file or folder that has some", options=("data",))
    return TextSource(spec, tuple(documents))


def _stdlib_documents(*, tests: bool) -> Iterator[Document]:
    """Yield the sources of the running Python's standard library, without generated tables.

    Args:
        tests: Yield the library's test suite instead of the library. Some distributions do not ship it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, children, files in os.walk(root):
        # Skip these folders while walking: installed packages are below the library and take most of a minute to walk.
        children[:] = [child for child in children if child not in _STDLIB_SKIPPED]
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    for path in sorted(paths):
        relative = path.relative_to(root)
        if tests != _STDLIB_TESTS.isdisjoint(relative.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(relative.as_posix(), text)


def _folder_documents(root: Path) -> list[Document]:
    """Return a folder's tables as documents, or else its other texts. Hidden files and folders are not read."""
    tables: list[Document] = []
    texts: list[Path] = []
    left_out: list[Path] = []
    refusals: list[InputError] = []
    for path in sorted(root.rglob("*")):
        # Editors leave hidden locks and copies, macOS hidden twins of every file.
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        suffix = _suffix(path)
        if path.is_symlink() and not path.exists() and suffix in TABLE_SUFFIXES | TEXT_SUFFIXES:
            raise InputError(f"{path}: is a link to a file that is not there; restore the file or delete the link")
        if not path.is_file():
            continue
        try:
            if suffix in TABLE_SUFFIXES | _UNPACKED_BY.keys() | {_ARROW}:
                tables += _file_documents(path, path.relative_to(root).as_posix())
            else:
                (texts if suffix in TEXT_SUFFIXES else left_out).append(path)
        except NotATable as error:
            if suffix in _ALWAYS_TABLES:
                raise
            refusals.append(error)
            left_out.append(path)
    if refusals and not tables and all(path.name.lower().startswith(_ABOUT_A_DATASET) for path in texts):
        raise refusals[0]
    _tell_left_out(root, left_out)
    if not tables:
        return [Document(path.relative_to(root).as_posix(), _read_text(path)) for path in texts]
    if texts:
        log.warning("%s: only its tables are read, not %d other texts such as %s", root, len(texts), texts[0].name)
    return tables


def _tell_left_out(root: Path, paths: Sequence[Path]) -> None:
    """Log how many files of a folder are not read, by suffix."""
    counts = Counter(path.suffix.lower() or "without a suffix" for path in paths)
    if counts:
        log.info("%s: not read: %s", root, ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common()))


def _in_every_split(documents: list[Document]) -> list[Document]:
    """Return the documents, cut into blocks if a split would be empty otherwise (in a folder of few files)."""
    if _fills_every_split(documents) or any(document.messages for document in documents):
        return documents
    blocks = [block for document in documents for block in _blocks(document.name, document.text)]
    return blocks if _fills_every_split(blocks) else documents


def _fills_every_split(documents: Sequence[Document]) -> bool:
    return {split_of(document.name) for document in documents} >= _REQUIRED_SPLITS


def _file_documents(path: Path, name: str) -> list[Document]:
    """Return the rows of a table, or the blocks of a text file, so that even a single file has held-out text."""
    suffix = _suffix(path)
    if suffix in _UNPACKED_BY.keys() | {".parquet", _ARROW}:
        with _readable(path):
            check_pulled(path)
    if suffix in _UNPACKED_BY:
        raise NotATable(f"{path}: is packed; unpack it first: {_UNPACKED_BY[suffix]} {path}")
    if suffix == _ARROW:
        raise NotATable(f"{path}: is {_AN_ARROW_FILE}")
    if suffix == ".parquet":
        return _numbered(name, parquet_rows(path))
    if suffix in READERS:
        return _numbered(name, READERS[suffix](path, _read_text(path)))
    return _blocks(name, _read_text(path))


def _suffix(path: Path) -> str:
    """Return the suffix that says what a file holds: of `a.jsonl.gz`, this is `.jsonl`."""
    inner = path.stem if path.suffix.lower() == ".gz" else path.name
    return Path(inner).suffix.lower()


def _numbered(name: str, rows: Sequence[Row]) -> list[Document]:
    return [Document(f"{name}#{i}", row.text, row.messages) for i, row in enumerate(rows)]


def _read_text(path: Path) -> str:
    """Return the text of a file, which gzip may have packed, without a byte order mark."""
    with _readable(path):
        if path.suffix.lower() == ".gz":
            check_pulled(path)
            text = _unpacked(path)
        else:
            text = path.read_text(encoding="utf-8")
            check_pulled_text(path, text)
    return text.removeprefix("\ufeff")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Refuse a file that cannot be read, or not as text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {_no_text(path, error.start)}") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: cannot be read: {reason}") from error


def _no_text(path: Path, start: int) -> str:
    """Return what a file is that is not UTF-8 text from some byte on, and what to do."""
    with path.open("rb") as opened:
        head = opened.read(8)
    known = next((said for begins, said in _BEGINS_WITH.items() if head.startswith(begins)), None)
    if known and path.suffix.lower() != ".gz":
        return f"is {known}"
    return f"not UTF-8 text (at byte {start}); convert it to UTF-8"


def _unpacked(path: Path) -> str:
    with gzip.open(path) as opened:
        content = opened.read(MOST_CHARACTERS + 1)
    if len(content) > MOST_CHARACTERS:
        raise InputError(f"{path}: holds more than {MOST_CHARACTERS} bytes; unpack it first: gzip -d {path}")
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()


def _blocks(name: str, text: str) -> list[Document]:
    """Cut text at line ends into numbered blocks, about a hundred of them, each of 256 to 4,096 characters at most.

    The blocks are assigned to the splits in turn (see `split_of`), so even a short file has text in each of them.
    """
    limit = min(_BLOCK_CHARACTERS, max(_LEAST_BLOCK_CHARACTERS, len(text) // 100))
    blocks: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), limit):
            piece = line[start : start + limit]
            if not blocks or size + len(piece) > limit:
                blocks.append("")
                size = 0
            blocks[-1] += piece
            size += len(piece)
    return [Document(f"{name}#{i}", block) for i, block in enumerate(blocks)]


def token_ids(document: Document, tokenizer: Tokenizer) -> list[int]:
    """Tokenize a document; a conversation passes through the tokenizer's chat template.

    Raises:
        InputError: The document is a conversation, and the tokenizer has no chat template or one that rejects it.
    """
    text = _rendered(document, tokenizer) if document.messages else document.text
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _rendered(document: Document, tokenizer: Any) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{document.name}: is a conversation, but the tokenizer of {name} has no chat template; take a model that "
            "has one, or write the rows as text",
            options=("data",),
        )
    try:
        return str(tokenizer.apply_chat_template(json.loads(document.messages), tokenize=False))
    except Exception as error:  # templates raise errors of their own
        raise InputError(
            f"{document.name}: the chat template of {name} rejects this conversation ({first_line(error)})",
            options=("data",),
        ) from error


def token_stream(documents: Sequence[Document], tokenizer: Tokenizer, enough: int = 0) -> torch.Tensor:
    """Tokenize documents into one stream, with an end-of-text token after each; a chat template ends conversations.

    Args:
        documents: The documents.
        tokenizer: Tokenizer of the model.
        enough: Number of tokens after which no further documents are read; 0 for all. Which documents are read is
            decided by the hashes of their names; they keep their order.

    Returns:
        int64 [tokens].

    Raises:
        InputError: A conversation cannot be rendered (see `token_ids`).
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    read: dict[int, array[int]] = {}  # arrays take 8 bytes per token, lists 36
    left = enough or math.inf
    for index in _shuffled(documents) if enough else range(len(documents)):
        if left <= 0:
            break
        document = documents[index]
        read[index] = array("q", token_ids(document, tokenizer) + ([] if document.messages else end))
        left -= len(read[index])
    ids = array("q")
    for index in sorted(read):
        ids.extend(read[index])
    return torch.frombuffer(ids, dtype=torch.int64) if ids else torch.zeros(0, dtype=torch.int64)


def _shuffled(documents: Sequence[Document]) -> list[int]:
    """Return the indices of documents in the order of their names' SHA-256, which is random but always the same."""
    return sorted(range(len(documents)), key=lambda index: _digest(documents[index].name))


def windows(stream: torch.Tensor, length: int, what: str = "text") -> torch.Tensor:
    """Cut a stream into whole windows and drop the remainder.

    Args:
        stream: int64 [tokens].
        length: Tokens per window.
        what: Name of the text, for the error message.

    Returns:
        int64 [windows, length].

    Raises:
        InputError: The stream is shorter than one window.
    """
    count = stream.numel() // length
    if count == 0:
        raise InputError(
            f"{what}: {stream.numel()} tokens do not fill one window of {length}; give more text or a smaller seq_len",
            options=("seq_len",),
        )
    return stream[: count * length].view(count, length)


def pick(text: torch.Tensor, tokens: int) -> torch.Tensor:
    """Pick windows that are spread evenly over a text.

    Args:
        text: int64 [windows, length].
        tokens: About how many tokens to pick; 0 for all.

    Returns:
        int64 [picked windows, length], at least one window.
    """
    count = len(text) if tokens <= 0 else max(1, min(len(text), tokens // text.shape[1]))
    return text[torch.linspace(0, len(text) - 1, count).long()]
