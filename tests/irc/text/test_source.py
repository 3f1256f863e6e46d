from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irc.errors import InputError
from irc.text.source import SPLITS, Document, TextSource, _blocks, load_text, split_of, token_stream, windows


class Letters:
    """Tokenizes text into the code points of its letters."""

    def __init__(self, eos_token_id: int | None = 0) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, text: str, /, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _refusal(spec: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        load_text(str(spec))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# Splits


def test_splits_are_stable() -> None:
    """Pinned, because another rule would mix the text that older bundles were trained on with held-out text."""
    pinned = {
        "abc.py": "train",
        "code.py": "heldout",
        "bisect.py": "calibration",
        "asyncio/events.py": "train",
        "a.txt#0": "train",
        "a.txt#1": "heldout",
        "a.txt#2": "calibration",
        "a.txt#12": "validation",
        "shutil.py": "validation",
    }
    assert {name: split_of(name) for name in pinned} == pinned


def test_splits_are_disjoint_and_complete() -> None:
    documents = tuple(Document(f"{index}.py", f"text {index}") for index in range(500))
    source = TextSource("x", documents)
    parts = [source.split(split) for split in SPLITS]
    names = [document.name for part in parts for document in part]
    assert sorted(names) == sorted(document.name for document in documents)
    assert len(set(names)) == len(names)
    # About 80/5/5/10: 500 hashes, four standard deviations.
    expected = (400, 25, 25, 50)
    assert [abs(len(part) - count) < 36 for part, count in zip(parts, expected, strict=True)] == [True] * 4


def test_splits_do_not_depend_on_order_or_company() -> None:
    documents = [Document(f"{index}.py", "x") for index in range(50)]
    all_held = {document.name for document in TextSource("x", tuple(documents)).split("heldout")}
    some_held = {document.name for document in TextSource("x", tuple(reversed(documents[:25]))).split("heldout")}
    assert some_held == all_held & {document.name for document in documents[:25]}


def test_a_file_of_three_pieces_has_all_splits() -> None:
    assert [split_of(f"{name}#{index}") for name in ("a", "b") for index in range(3)] == [
        "train",
        "heldout",
        "calibration",
    ] * 2
    assert [split_of(f"a#{index}") for index in range(100)].count("train") == 80


def test_names_that_are_no_utf8_have_a_split() -> None:
    assert split_of("bad\udcff.txt") in SPLITS


# Blocks


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=8), st.integers(1, 600))
def test_blocks_lose_no_character(pieces: list[str], repeat: int) -> None:
    text = "\n".join(pieces) * repeat
    blocks = _blocks("t", text)
    assert "".join(block.text for block in blocks) == text
    longest = min(4096, max(256, len(text) // 100))
    assert all(0 < len(block.text) <= longest for block in blocks)
    assert [block.name for block in blocks] == [f"t#{index}" for index in range(len(blocks))]


def test_blocks_end_at_line_ends() -> None:
    text = "".join(f"line {index}\n" for index in range(2000))
    blocks = _blocks("t", text)
    assert len(blocks) > 3
    assert all(block.text.endswith("\n") for block in blocks)


def test_a_long_text_that_grows_keeps_its_first_blocks() -> None:
    """So its held-out text stays held out. Shorter texts are cut into smaller blocks."""
    text = "".join(f"line {index}\n" for index in range(40_000))
    before = _blocks("t", text)
    assert _blocks("t", text + "more\n" * 2000)[: len(before) - 1] == before[:-1]


def test_a_text_of_a_few_thousand_characters_has_all_splits() -> None:
    source = TextSource("t", tuple(_blocks("t", "".join(f"line {index}\n" for index in range(500)))))
    assert all(source.split(split) for split in SPLITS)


# Files and folders


def test_text_file(tmp_path: Path) -> None:
    text = "Grüße\n" * 3000
    path = _write(tmp_path / "a.txt", text)
    source = load_text(str(path))
    assert source.name == str(path)
    assert "".join(document.text for document in source.documents) == text
    assert {document.name.partition("#")[0] for document in source.documents} == {"a.txt"}
    assert all(source.split(split) for split in SPLITS)


def test_folder_is_read_in_order_with_names_relative_to_it(tmp_path: Path) -> None:
    _write(tmp_path / "b.txt", "two")
    _write(tmp_path / "a" / "c.md", "one")
    _write(tmp_path / "d.bin", b"\xff\xfe\x00")
    _write(tmp_path / "e.rst", b"\xef\xbb\xbfthree")
    source = load_text(str(tmp_path))
    assert source.documents == (Document("a/c.md", "one"), Document("b.txt", "two"), Document("e.rst", "three"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("e.JSONL", '{"text": "rows"}\n'), ("a/e.json", '[{"text": "rows"}]'), ("e.csv", "text\nrows\n")],
)
def test_a_folder_with_tables_is_read_for_them_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: str
) -> None:
    caplog.set_level("INFO")
    _write(tmp_path / name, content)
    _write(tmp_path / "README.md", b"\xff about the rows")
    _write(tmp_path / "dataset_info.json", '{"features": {"text": {"dtype": "string"}}, "splits": {"train": {}}}')
    for left_out in ("a.png", "b.png", "LICENSE", ".git/x.pack"):
        _write(tmp_path / left_out, "x")
    assert load_text(str(tmp_path)).documents == (Document(f"{name}#0", "rows"),)
    by_suffix, texts = caplog.messages
    assert by_suffix.partition(": not read: ")[2] == "2 .png, 1 without a suffix, 1 .json"
    assert "README.md" in texts


def test_a_folder_of_code_is_read_without_its_json(tmp_path: Path) -> None:
    _write(tmp_path / "a.js", "let a")
    _write(tmp_path / "package.json", '{"name": "a", "files": ["a.js"]}')
    _write(tmp_path / "tsconfig.json", '{"strict": true} // as tsc reads it')
    _write(tmp_path / "data.csv", "x,y\n1,2\n")
    assert load_text(str(tmp_path)).documents == (Document("a.js", "let a"),)


@pytest.mark.parametrize(
    ("name", "found"), [("train.json", "question"), ("train.csv", "question"), ("data/train.jsonl.zst", "zstd -d")]
)
@pytest.mark.parametrize("readme", [True, False])
def test_a_folder_is_not_read_for_its_readme(tmp_path: Path, name: str, found: str, readme: bool) -> None:
    _write(tmp_path / name, '[{"question": "q"}]' if name.endswith("json") else "question,answer\n")
    if readme:
        _write(tmp_path / "README_en.md", "about the rows\n" * 300)
    refusal = _refusal(tmp_path)
    assert refusal.startswith(str(tmp_path / name))
    assert found in refusal


def test_a_folder_of_one_file_has_all_splits(tmp_path: Path) -> None:
    text = "".join(f"line {index}\n" for index in range(500))
    _write(tmp_path / "a.txt", text)
    source = load_text(str(tmp_path))
    assert all(source.split(split) for split in SPLITS)
    assert "".join(document.text for document in source.documents) == text


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = _write(tmp_path / "a.txt", content)
    assert str(path) in _refusal(path)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "only.bin", "x")
    assert str(tmp_path) in _refusal(tmp_path)


def test_missing_path_is_refused(tmp_path: Path) -> None:
    assert "nothing.txt" in _refusal(tmp_path / "nothing.txt")


def test_text_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", b"ok \xe9t\xe9")
    for spec in (path, tmp_path):
        refusal = _refusal(spec)
        assert refusal.startswith(str(path))
        assert "byte 3" in refusal


# The standard library


def test_stdlib_has_all_splits_and_no_tests() -> None:
    source = load_text("stdlib")
    names = {document.name for document in source.documents}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any("/test/" in f"/{name}" or "site-packages" in name for name in names)
    assert all(len(source.split(split)) > 20 for split in SPLITS)


# Fingerprints


def test_equal_text_has_an_equal_fingerprint(tmp_path: Path) -> None:
    first = load_text(str(_write(tmp_path / "x" / "a.txt", "hello")))
    second = load_text(str(_write(tmp_path / "y" / "a.txt", "hello")))
    assert first.fingerprint() == second.fingerprint()
    assert len(first.fingerprint()) == 64


@pytest.mark.parametrize(
    "other",
    [
        [("a", "xy"), ("b", "z")],
        [("a", "x"), ("by", "z")],
        [("b", "yz"), ("a", "x")],
        [("a", "x"), ("b", "yz"), ("c", "")],
        [("ax", ""), ("b", "yz")],
    ],
)
def test_any_change_changes_the_fingerprint(other: list[tuple[str, str]]) -> None:
    first = TextSource("s", (Document("a", "x"), Document("b", "yz")))
    second = TextSource("s", tuple(Document(*pair) for pair in other))
    assert first.fingerprint() != second.fingerprint()


def test_fingerprint_takes_lone_surrogates() -> None:
    assert TextSource("s", (Document("a", "\ud800"),)).fingerprint()


# Tokens


@pytest.mark.parametrize(("eos", "expected"), [(0, [97, 98, 0, 99, 0]), (None, [97, 98, 99])])
def test_token_stream_ends_every_document(eos: int | None, expected: list[int]) -> None:
    stream = token_stream([Document("1", "ab"), Document("2", "c")], Letters(eos))
    assert stream.dtype == torch.int64
    assert stream.tolist() == expected


def test_windows_cut_whole_ones_and_drop_the_rest() -> None:
    assert windows(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert windows(torch.arange(3), 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("tokens", [0, 2])
def test_text_shorter_than_one_window_is_refused(tokens: int) -> None:
    with pytest.raises(InputError) as caught:
        windows(torch.arange(tokens), 3, "heldout of a.txt")
    refusal = str(caught.value)
    assert refusal.startswith("heldout of a.txt: ")
    assert f"{tokens} tokens" in refusal
    assert "seq_len" in refusal


def test_a_dataset_without_a_name_is_refused() -> None:
    with pytest.raises(InputError, match="hf:NAME"):
        load_text("hf:")


@pytest.mark.parametrize(("spec", "found"), [("", "empty"), (" ", "empty"), ("caf\udce9.txt", r"\udce9.*not UTF-8")])
def test_a_name_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n")  # an empty path is the folder itself
    if spec.strip():
        (tmp_path / spec).write_text("some text\n")
    with pytest.raises(InputError, match=found):
        load_text(spec)


def test_a_link_to_nothing_in_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / ".#a.txt").symlink_to("user@host.123")  # the lock of an editor
    assert load_text(str(tmp_path)).documents
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(InputError, match=r"b\.jsonl: is a link"):
        load_text(str(tmp_path))


def test_hidden_files_and_folders_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("seen\n" * 400)
    (tmp_path / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.txt").write_text("twice\n" * 400)
    (tmp_path / ".#b.txt").symlink_to("user@host.1")
    assert "twice" not in "".join(document.text for document in load_text(str(tmp_path)).documents)
