"""examples/development_texts.py on tiny packages: what each reader makes, the files, and the line about them."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "development_texts.py"
WORDS = " ".join(f"word{number}" for number in range(200))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("development_texts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def deb(path: Path, files: dict[str, bytes]) -> Path:
    """Write a package as Debian does: an ar archive whose second entry of odd length shifts the third by one byte."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    entries = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    header = "{:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n"
    parts = [b"!<arch>\n"]
    for name, body in entries.items():
        parts += [header.format(name, 0, 0, 0, 100644, len(body)).encode(), body, b"\n" * (len(body) % 2)]
    path.write_bytes(b"".join(parts))
    return path


def test_a_kind_is_made_of_the_matching_files_of_both_kinds_of_packages(script: ModuleType, tmp_path: Path) -> None:
    files = {
        "./usr/share/doc/one/b.txt": f"B\r\n\r\n\r\n\r\n{WORDS}".encode(),
        "./usr/share/doc/one/a.txt.gz": gzip.compress(f"A café {WORDS}".encode("latin-1")),
        "./usr/share/doc/one/stub.txt": b"too short",
        "./usr/share/doc/one/c.md": WORDS.encode(),
    }
    deb(tmp_path / "one_1.0_all.deb", files)
    deb(tmp_path / "one-more_1.0_all.deb", {})
    with zipfile.ZipFile(tmp_path / "the_other-2.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("other/c.txt", f"C {WORDS}")
    sources = [
        script.Source("prose", "one", "*.txt", script.plain),
        script.Source("prose", "the-other", "*.txt", script.plain, "pypi"),
        script.Source("prose", "third", "*.txt", script.plain),
    ]
    found = {source: script.find(tmp_path, source) for source in sources}
    assert [path and path.name for path in found.values()] == [
        "one_1.0_all.deb", "the_other-2.0-py3-none-any.whl", None
    ]  # fmt: skip
    del found[sources[2]]
    line = script.make_kind("prose", found, tmp_path / "texts")
    written = {path.name: path.read_bytes() for path in sorted((tmp_path / "texts/prose").iterdir())}
    assert written == {
        "one-share_doc_one_a.txt.txt": f"A café {WORDS}\n".encode(),
        "one-share_doc_one_b.txt.txt": f"B\n\n{WORDS}\n".encode(),
        "the-other-other_c.txt.txt": f"C {WORDS}\n".encode(),
    }
    digest = hashlib.sha256(b"".join(written.values())).hexdigest()
    assert line.split() == ["prose", "3", "documents", "604", "words", "sha256", digest]


def test_the_commands_name_each_package_at_its_registry(script: ModuleType) -> None:
    assert script.commands(script.SOURCES[-1:]) == "apt-get download wesnoth-1.16-utbs"
    debian, pypi = script.commands(script.SOURCES).split("\n")
    assert debian.startswith("apt-get download r-cran-janeaustenr anarchism ")
    assert pypi == "pip download --no-deps sympy chitchat-dataset"


def test_a_page_loses_its_tags_and_navigation(script: ModuleType) -> None:
    page = b"""<html><head><title>T</title></head><body><!-- <p>old --><div class="navheader"><a>Next</a></div>
<p>One &amp; <b>two</b></p><pre>a
  b</pre><script>x = 1</script></body></html>"""
    assert script.page(page)[0].split("\n") == ["", "", "One & two", "", "a", "  b", ""]


def test_books_in_r_data_are_cut_into_chapters(script: ModuleType) -> None:
    def vector(*lines: str) -> bytes:
        strings = (b"\x00\x04\x00\x09" + len(line).to_bytes(4, "big") + line.encode() for line in lines)
        data = b"X\n\x00\x00\x00\x02" + b"".join(strings)
        return len(data).to_bytes(4, "big") + zlib.compress(data)

    content = vector("A BOOK", "", "CHAPTER I", "It rained.", "nine char") + vector("Chapter 1", "Sun.")
    assert script.chapters(content) == ["A BOOK\n", "CHAPTER I\nIt rained.\nnine char", "Chapter 1\nSun."]


def test_the_long_quoted_lines_of_missions_are_told(script: ModuleType) -> None:
    told = "The port is quiet, and nobody looks up as you come in from the rain."
    mission = f'mission "X"\n\tlog `{told}`\n\tconversation\n\t\t"\t{told} \'Sit,\' says one."\n\t\t`(Leave.)`\n'
    assert script.narration(mission.encode()) == [f"{told}\n\n{told} 'Sit,' says one."]


def test_what_is_said_in_scenarios_and_chats(script: ModuleType) -> None:
    scenario = b"""[message]
    speaker=Konrad
    message= _ "He said ""no"",
<i>twice</i>."
[/message][message]
    message=$variable
[/message][message]
    role=Advisor
    message=_ "Onward!"
[/message]"""
    assert script.scenario(scenario) == ['Konrad: He said "no", twice.\n\nAdvisor: Onward!']
    turns = [[("x", "Hello"), ("x", "Anyone? ")], [], [("y", "Yes.")], [("x", "Good.")]]
    messages = [[{"sender": name, "text": text} for name, text in turn] for turn in turns]
    talks = json.dumps({"id": {"messages": messages}}).encode()
    assert script.chats(talks) == ["A: Hello\nAnyone?\nB: Yes.\nA: Good."]
