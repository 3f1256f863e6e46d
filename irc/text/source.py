"""Text sources, their splits, and the token windows that training and evaluation read.

A source is a list of named documents. Its splits are fixed by hashes of names and offsets, never by
order or by a random generator, so that every command sees the same held-out text.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from irc.errors import InputError
from irc.text.rows import hub_texts, json_texts, parquet_texts

Split = Literal["train", "calibration", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "validation", "heldout")
_NEEDED = frozenset({"train", "calibration", "heldout"})

TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .py .js .ts .c .h .cpp .java .go .rs .tex .html .xml .csv .yaml .yml .toml".split()
)

_BLOCK_CHARACTERS, _LEAST_BLOCK_CHARACTERS = 4096, 256
_STDLIB_SKIPPED = frozenset("site-packages dist-packages encodings pydoc_data __pycache__".split())
_STDLIB_TESTS = frozenset("test tests idle_test".split())


class Tokenizer(Protocol):
    """What `windows` needs of a Hugging Face tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: str, /, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """Return `input_ids` of a text."""
        ...


@dataclass(frozen=True)
class Document:
    """One piece of text and the name that decides which split it belongs to."""

    name: str
    text: str


@dataclass(frozen=True)
class TextSource:
    """Documents from one place, with a stable three-way split.

    Attributes:
        name: What the user asked for (a path, `stdlib`, `hf:NAME`).
        documents: The text, in a stable order.
    """

    name: str
    documents: tuple[Document, ...]

    def split(self, split: Split) -> list[Document]:
        """Return the documents of one split.

        One document in ten is `heldout`, one in twenty `calibration`, one in twenty `validation`, all others are
        `train` (see `split_of`).
        """
        return [document for document in self.documents if split_of(document.name) == split]

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names and texts; equal text gives an equal fingerprint."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.name, document.text):
                encoded = part.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
        return digest.hexdigest()


def split_of(name: str) -> Split:
    """Return the split of a document name: 80 % train, 5 % calibration, 5 % validation, 10 % held out.

    Numbered pieces of one file (`name#3`) take turns, so that a file of three pieces has train, calibration and
    held-out text; other names are spread by their SHA-256. Figures are reported on held-out text, thresholds set on
    calibration text, settings chosen on validation text.
    """
    _, mark, number = name.rpartition("#")
    if mark and number.isdecimal():
        turn = int(number) - 1
        bucket, half = turn % 10, turn // 10 % 2
    else:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
        bucket, half = int.from_bytes(digest[:8], "big") % 10, 1 - digest[8] % 2
    if bucket == 1:
        return "validation" if half else "calibration"
    return "heldout" if bucket == 0 else "train"


def load_text(spec: str) -> TextSource:
    """Read the text that `--data` names.

    Args:
        spec: `stdlib`, `stdlib-tests`, `hf:NAME[:CONFIG]` (streamed, see `irc.text.rows`), a text file, a .jsonl or
            .parquet file with a text column, or a folder of such files.

    Raises:
        InputError: Nothing is there, it is not text, or it is empty.
    """
    if spec == "stdlib":
        documents = list(_stdlib_documents(tests=False))
    elif spec == "stdlib-tests":
        documents = list(_stdlib_documents(tests=True))
    elif spec == "hf:":
        raise InputError("--data hf:: a dataset's name is missing; give hf:NAME")
    elif spec.startswith("hf:"):
        documents = _blocks(spec, "\n\n".join(hub_texts(spec[3:])))
    else:
        path = Path(spec)
        if path.is_dir():
            documents = _in_every_split(list(_folder_documents(path)))
        elif path.is_file():
            documents = _file_documents(path, path.name)
        else:
            raise InputError(f"--data {spec}: there is no such file or folder; give a path, 'stdlib' or 'hf:NAME'")
    if not any(document.text.strip() for document in documents):
        raise InputError(f"--data {spec}: it holds no text; give a non-empty text file or folder")
    return TextSource(spec, tuple(documents))


def _stdlib_documents(*, tests: bool) -> Iterator[Document]:
    """Yield the sources of the running Python's standard library, generated tables left out.

    Args:
        tests: Yield its test suite instead of the library itself (some distributions ship none).
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, children, files in os.walk(root):
        # Pruned here: installed packages lie below the library, and walking them can take most of a minute.
        children[:] = [child for child in children if child not in _STDLIB_SKIPPED]
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    for path in sorted(paths):
        relative = path.relative_to(root)
        if tests != _STDLIB_TESTS.isdisjoint(relative.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(relative.as_posix(), text)


def _folder_documents(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES | {".jsonl", ".parquet"}:
            name = path.relative_to(root).as_posix()
            if path.suffix.lower() in (".jsonl", ".parquet"):
                yield from _file_documents(path, name)
            else:
                yield Document(name, _read_text(path))


def _in_every_split(documents: list[Document]) -> list[Document]:
    """Return the documents, cut into blocks where whole ones would leave a split empty (a folder of few files)."""
    blocks = [block for document in documents for block in _blocks(document.name, document.text)]
    for pieces in (documents, blocks):
        if {split_of(piece.name) for piece in pieces} >= _NEEDED:
            return pieces
    return documents


def _file_documents(path: Path, name: str) -> list[Document]:
    """Split one file into blocks of lines, so that a single file too has held-out text."""
    if path.suffix.lower() == ".jsonl":
        return [Document(f"{name}#{i}", text) for i, text in enumerate(json_texts(path, _read_text(path)))]
    if path.suffix.lower() == ".parquet":
        return [Document(f"{name}#{i}", text) for i, text in enumerate(parquet_texts(path))]
    return _blocks(name, _read_text(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _blocks(name: str, text: str) -> list[Document]:
    """Cut text at line ends into numbered blocks of at most 4,096 characters, a hundred of them if it can be.

    The blocks take turns in the splits (see `split_of`), so that even a short file has all three.
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


def token_stream(documents: Sequence[Document], tokenizer: Tokenizer) -> torch.Tensor:
    """Tokenise documents into one stream with an end-of-text token after each.

    Returns:
        int64 [tokens].
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = array("q")  # of 8 bytes a token; a list takes 36
    for document in documents:
        ids.extend(tokenizer(document.text, add_special_tokens=False)["input_ids"] + end)
    return torch.frombuffer(ids, dtype=torch.int64) if ids else torch.zeros(0, dtype=torch.int64)


def windows(stream: torch.Tensor, length: int, what: str = "text") -> torch.Tensor:
    """Cut a stream into whole windows; the rest shorter than one window is dropped.

    Args:
        stream: int64 [tokens].
        length: Tokens a window.
        what: Name of the text, for the error.

    Returns:
        int64 [windows, length].

    Raises:
        InputError: The stream is shorter than one window.
    """
    count = stream.numel() // length
    if count == 0:
        raise InputError(
            f"{what}: {stream.numel()} tokens are less than one window of {length}; "
            "give more text or a shorter --seq-len"
        )
    return stream[: count * length].view(count, length)


def pick(text: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return about `tokens` tokens of windows [windows, length] spread evenly over the text; all of them when 0."""
    count = len(text) if tokens <= 0 else max(1, min(len(text), tokens // text.shape[1]))
    return text[torch.linspace(0, len(text) - 1, count).long()]
