"""Text and conversations from tables (JSON Lines, JSON, CSV, parquet) and streamed datasets.

Without a connection, a dataset of the hub is read from the cache of `datasets` or of the hub's client, or refused.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from irc.errors import InputError
from irc.text import rows as text_rows
from irc.text import source as text_source
from irc.text.source import Document, load_text, token_stream

needs_data = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("datasets", "pyarrow")),
    reason="needs datasets and pyarrow, which the extra 'data' installs",
)
LINES = [f"{number} of many lines, with the same few words in each of them" for number in range(1500)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _jsonl(folder: Path, content: str) -> Path:
    path = folder / "a.jsonl"
    path.write_bytes(content.encode())
    return path


def _refused(path: Path, rest: str) -> Any:
    """Expect an error of one line that begins with the path and contains the pattern `rest`."""
    return pytest.raises(InputError, match=rf"^{re.escape(str(path))}.*{rest}.*\Z")


@pytest.mark.parametrize("column", ["text", "content", "document"])
def test_jsonl_takes_the_text_column(tmp_path: Path, column: str) -> None:
    rows = [{"id": 1, column: "one"}, {column: "two\nlines", "id": 2}]
    path = _jsonl(tmp_path, "\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert load_text(str(path)).documents == (Document("a.jsonl#0", "one"), Document("a.jsonl#1", "two\nlines"))


def test_jsonl_strings_may_hold_any_line_end_but_a_line_feed(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, '{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}')
    assert [document.text for document in load_text(str(path)).documents] == ["a\u2028b\u0085c", "d"]


def test_jsonl_rows_without_text_are_empty_not_the_word_none(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, '{"text": "a"}\n{"text": null}\n{"other": 1}\n{"text": "b"}\n')
    assert [document.text for document in load_text(str(path)).documents] == ["a", "", "", "b"]


def test_malformed_jsonl_is_refused_with_its_line(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, '{"text": "a"}\n\n{"text": \n')
    with _refused(path, "line 3"):
        load_text(str(path))


def test_jsonl_of_other_values_is_refused_with_its_line(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, '{"text": "a"}\n["b"]\n')
    with _refused(path, "line 2: .*list"):
        load_text(str(path))


@pytest.mark.parametrize("content", ['{"body": "a"}\n', ""])
def test_jsonl_without_a_text_column_is_refused(tmp_path: Path, content: str) -> None:
    path = _jsonl(tmp_path, content)
    with _refused(path, "text, content, document"):
        load_text(str(path))


def _texts(path: Path) -> list[str]:
    return [document.text for document in load_text(str(path)).documents]


def test_the_first_row_with_a_known_column_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _jsonl(tmp_path, '{"meta": 1}\n{"content": "a"}\n{"content": "b"}\n{"text": "c", "content": "d"}')
    assert _texts(path) == ["", "a", "b", "d"]
    (told,) = caplog.messages
    assert told.startswith(str(path))
    assert "1 of 4 rows" in told
    assert "'content'" in told


def test_a_table_most_of_whose_rows_have_no_text_is_refused(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, '{"text": "a"}\n{"content": "b"}\n{"text": null}\n')
    with _refused(path, "2 of 3 rows .*'text'"):
        load_text(str(path))


@pytest.mark.parametrize(
    ("value", "name"), [([], "list"), (["a"], "list"), ({"a": 1}, "dict"), (5, "int"), (False, "bool")]
)
@pytest.mark.parametrize("column", ["text", "content"])
def test_values_that_are_not_text_are_refused_with_their_row(
    tmp_path: Path, column: str, value: object, name: str
) -> None:
    path = _jsonl(tmp_path, "\n".join(json.dumps(row) for row in [{column: "a"}, {column: value}]))
    with _refused(path, f"line 2, column '{column}': found {name} {re.escape(repr(value))}"):
        load_text(str(path))


@pytest.mark.parametrize("row", [r'{"text": "see \ud83d you"}', r'{"messages": [{"role": "a", "content": "\ud83d"}]}'])
def test_half_a_surrogate_pair_is_refused_with_its_row(tmp_path: Path, row: str) -> None:
    path = _jsonl(tmp_path, row.replace("\\ud83d", "\\ud83d\\ude00") + "\n" + row)
    with _refused(path, r"line 2, column '(text|messages)'.*'\\ud83d'"):
        load_text(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.ndjson", '{"text": "a"}\n{"text": "b"}'),
        ("a.json", '[{"text": "a"}, {"text": "b"}]'),
        ("a.json", '{"version": "1", "data": [{"text": "a"}, {"text": "b"}]}'),
        ("a.json", '{"1": {"text": "a"}, "2": {"text": "b"}}'),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n'),
        ("a.JSON.gz", '[{"text": "a"}, {"text": "b"}]'),
        ("a.jsonl.gz", '{"text": "a"}\r\n{"text": "b"}'),
        ("a.csv", 'id,text\n1,a\n2,"b"\n'),
        ("a.tsv.gz", "id\ttext\n1\ta\n2\tb\n"),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_tables_of_other_forms(tmp_path: Path, name: str, content: str, mark: bytes) -> None:
    path = tmp_path / name
    path.write_bytes((gzip.compress if path.suffix == ".gz" else bytes)(mark + content.encode()))
    assert load_text(str(path)).documents == (Document(f"{name}#0", "a"), Document(f"{name}#1", "b"))


def test_one_json_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n "text": "a",\n "tags": [{"content": "b"}]\n}')
    assert _texts(tmp_path / "a.json") == ["a"]


def test_csv_fields_may_hold_line_ends_and_much_text(tmp_path: Path) -> None:
    long = "many words, " * 20_000
    (tmp_path / "a.csv").write_text(f'text,id\n"one\n""two""",1\n"{long}",2\n')
    assert _texts(tmp_path / "a.csv") == ['one\n"two"', long]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.json", '{"key": "value"}', "list of objects"),
        ("a.json", "[1, 2]", "list of objects"),
        ("a.json", '[{"body": "a"}]', "body.*text, content, document"),
        ("a.json", '[{"text": "a"}, 5]', "row 2: .*int"),
        ("a.json", '[{"text": "a"}', "not JSON"),
        ("a.json", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.csv", "one,two\n1,2\n", "one, two"),
        ("a.csv", "id,text\n1,a, b\n", "line 2.*more fields"),
        ("a.csv", 'id,text\n1,a\n2,"b\n', "line 3"),
        ("a.csv", "text,id,text\na,1,b\n", "2 columns 'text'"),
        ("a.jsonl.zst", "", "zstd -d"),
        ("a.jsonl.zstd", "", "zstd -d"),
        ("a.arrow", "", "to_parquet"),
        ("a.txt.xz", "", "xz -d"),
        ("a.tar.gz", "", "tar -xf"),
        ("a.jsonl.gz", "no gzip", "gzip"),
    ],
)
def test_other_files_are_refused_with_the_remedy(tmp_path: Path, name: str, content: str, found: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with _refused(path, found):
        load_text(str(path))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (gzip.compress(b"text", mtime=0), r"end its name with \.gz"),
        (b"\x28\xb5\x2f\xfd\x00", "zstd -d"),
        (b"PK\x03\x04\xff", "zip"),
        (b"%PDF-1.4\n\xe2\xe3", "PDF"),
        (b"PAR1\xff", r"\.parquet"),
        (b"ARROW1\0\0\xff", "to_parquet"),
        (b"\xe9t\xe9", "byte 0.*convert it to UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_that_is_no_text_is_told_by_its_first_bytes(
    tmp_path: Path, name: str, content: bytes, found: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with _refused(tmp_path / name, found):
        load_text(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "csv", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
def test_a_git_lfs_pointer_is_no_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c\nsize 9\n")
    (tmp_path / "b.txt").write_text("some text\n")
    for spec in (path, tmp_path):
        with _refused(path, "git lfs pull"):
            load_text(str(spec))


def test_joined_files_keep_their_byte_order_marks(tmp_path: Path) -> None:
    assert _texts(_jsonl(tmp_path, '\ufeff{"text": "a"}\n\ufeff{"text": "\ufeffb"}\n')) == ["a", "\ufeffb"]


def test_packed_files_are_read_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt.gz"
    packed = gzip.compress(b"some text\n" * 100)
    path.write_bytes(packed)
    assert "".join(_texts(path)) == "some text\n" * 100
    path.write_bytes(packed[:-9])
    with _refused(path, "cannot be read"):
        load_text(str(path))
    path.write_bytes(packed)
    monkeypatch.setattr(text_source, "MOST_CHARACTERS", 999)
    with _refused(path, "999.*gzip -d"):
        load_text(str(path))


# Conversations

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TWO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture
def tokenizer(model_folder: Path) -> Any:
    """The tokenizer of one token a byte, with a chat template."""
    made = PreTrainedTokenizerFast.from_pretrained(model_folder)
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TWO},
        {"id": 1, "conversation": TWO},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho", "weight": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TWO[1] | {"tool_calls": None}]},
    ],
)
def test_conversations_pass_through_the_chat_template(tmp_path: Path, tokenizer: Any, row: dict[str, Any]) -> None:
    source = load_text(str(_jsonl(tmp_path, json.dumps(row) + "\n" + json.dumps(row))))
    assert [(document.name, document.text) for document in source.documents] == [
        ("a.jsonl#0", "hi\n\nho"),
        ("a.jsonl#1", "hi\n\nho"),
    ]
    assert tokenizer.decode(token_stream(source.documents, tokenizer)) == 2 * "<user>hi<assistant>ho"


def test_the_fingerprint_covers_the_roles(tmp_path: Path) -> None:
    fingerprints = set()
    for role in ("user", "system"):
        path = _jsonl(tmp_path, json.dumps({"messages": [{"role": role, "content": "hi"}]}))
        fingerprints.add(load_text(str(path)).fingerprint())
    fingerprints.add(load_text(str(_jsonl(tmp_path, '{"text": "hi"}'))).fingerprint())
    assert len(fingerprints) == 3


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("hi", "column 'messages': found str 'hi'"),
        (["hi"], "message 1: found str 'hi'"),
        ([TWO[0], {"role": "user"}], "message 2: .*content None"),
        ([{"content": "hi"}], "message 1: .*role None"),
        ([{"from": ["human"], "value": "hi"}], "message 1: .*role .'human'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: .*image"),
    ],
)
def test_conversations_that_are_not_text_are_refused(tmp_path: Path, value: object, found: str) -> None:
    path = _jsonl(tmp_path, json.dumps({"messages": TWO}) + "\n" + json.dumps({"messages": value}))
    with _refused(path, f"line 2, .*{found}"):
        load_text(str(path))


@pytest.mark.parametrize(
    ("template", "reason"), [(None, "no chat template"), ("{{ raise_exception('roles must alternate') }}", "alternate")]
)
def test_a_tokenizer_that_cannot_render_a_conversation(
    tmp_path: Path, tokenizer: Any, template: str | None, reason: str
) -> None:
    tokenizer.chat_template = template
    source = load_text(str(_jsonl(tmp_path, json.dumps({"messages": TWO}))))
    with pytest.raises(InputError, match=rf"^a\.jsonl#0: .*{reason}"):
        token_stream(source.documents, tokenizer)


@needs_data
def test_conversations_of_parquet_and_of_a_dataset(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"messages": TWO}, {"messages": [TWO[0] | {"name": "me"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for spec in (str(tmp_path / "a.parquet"), f"hf:{tmp_path}"):
        documents = load_text(spec).documents
        assert [document.name.rpartition("#")[2] for document in documents] == ["0", "1"]
        assert tokenizer.decode(token_stream(documents, tokenizer)) == "<user>hi<assistant>ho<user>hi"


@needs_data
@pytest.mark.parametrize("spec", ["{}/a.parquet", "hf:{}"])
def test_lists_of_parquet_and_of_a_dataset_are_refused(tmp_path: Path, spec: str) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [["a"], ["b"]]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=rf"^{re.escape(spec.format(tmp_path))}, row 1, column 'text': found list"):
        load_text(spec.format(tmp_path))


def test_a_dataset_without_a_text_column_is_not_downloaded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(text_rows, "_streamed", lambda name: (seen.append(i) or {"label": i} for i in range(10**6)))
    with pytest.raises(InputError, match=r"^hf:x: .*label"):
        load_text("hf:x")
    assert len(seen) < 2000


@needs_data
def test_parquet_with_broken_text_or_two_columns(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    buffers = [None, pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0])), pyarrow.py_buffer(b"a\xff\xfe")]
    parquet.write_table(pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)}), path)
    with _refused(path, r"row 2, column 'text': not UTF-8 text \(byte b'\\xff'"):
        load_text(str(path))
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]), path)
    with _refused(path, "2 columns 'text'"):
        load_text(str(path))


@needs_data
def test_parquet_takes_the_text_column(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "two"]}), path)
    assert load_text(str(path)).documents == (
        Document("a.parquet#0", "one"),
        Document("a.parquet#1", ""),
        Document("a.parquet#2", "two"),
    )


@needs_data
def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("no parquet")
    with _refused(path, "not a parquet file"):
        load_text(str(path))


@needs_data
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_datasets_are_streamed_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    """Rows after the limit are never requested, from a folder as from the hub."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    rows = [{"id": number, "text": f"text {number:05}"} for number in range(5000)]
    if suffix == "jsonl":
        _jsonl(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    seen: list[object] = []
    load = datasets.load_dataset

    def watched(*args: object, **kwargs: object) -> object:
        return (seen.append(row) or row for row in load(*args, **kwargs))

    monkeypatch.setattr(datasets, "load_dataset", watched)
    monkeypatch.setattr(text_rows, "MOST_CHARACTERS", 1000)
    assert text_of(f"hf:{tmp_path}") == "\n\n".join(row["text"] for row in rows[:100])
    assert len(seen) == 101
    assert "1000 characters" in caplog.text


@pytest.mark.parametrize("spec", ["a.parquet", "hf:some/name"])
def test_without_the_extra_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    for package in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").touch()
    with pytest.raises(InputError, match=r"^.*pip install 'informed-routing-compiler\[data\]'.*\Z"):
        load_text(spec)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return an empty folder for both caches, as HF_HOME and HF_HUB_OFFLINE=1 set up, which a process reads once."""
    datasets = pytest.importorskip("datasets", reason="needs datasets, which the extra 'data' installs")
    from huggingface_hub import constants

    for module in (datasets.config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path


def parquet(path: Path) -> Path:
    import datasets

    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict({"id": range(len(LINES)), "text": LINES}).to_parquet(path)
    return path


def prepare(home: Path) -> None:
    """Write the files that `datasets.load_dataset("some/name")` leaves in its cache."""
    import datasets

    source = parquet(home / "source" / "train.parquet")
    builder = datasets.load_dataset_builder("parquet", data_files={"train": str(source)})
    builder.dataset_name, builder.info.config_name = "name", "default"
    builder.download_and_prepare(str(home / "datasets" / "some___name" / "default" / "0.0.0" / COMMIT))


def download(home: Path, card: str = "license: mit", *, data: bool = True) -> None:
    """Write the files that `hf download --repo-type dataset some/name` leaves, or those of streaming without data."""
    repository = home / "hub" / "datasets--some--name"
    snapshot = repository / "snapshots" / COMMIT
    for path, text in ((repository / "refs" / "main", COMMIT), (snapshot / "README.md", f"---\n{card}\n---\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    if data:
        parquet(snapshot / "data" / "train-00000-of-00001.parquet")


def text_of(spec: str) -> str:
    return "".join(document.text for document in load_text(spec).documents)


@pytest.mark.parametrize("lay_down", [prepare, download])
def test_the_caches_are_read(offline: Path, lay_down: Callable[[Path], None]) -> None:
    lay_down(offline)
    assert text_of("hf:some/name") == "\n\n".join(LINES)


def test_a_downloaded_dataset_keeps_its_configurations(offline: Path) -> None:
    download(offline, "configs:\n- config_name: small\n  data_files:\n  - split: train\n    path: data/*")
    assert text_of("hf:some/name:small") == "\n\n".join(LINES)
    with pytest.raises(InputError, match=r"hf:some/name:large: .*'large' not found.*'small'"):
        load_text("hf:some/name:large")


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_in_no_cache_is_refused_with_the_remedy(offline: Path, streamed: bool) -> None:
    if streamed:
        download(offline, data=False)
    with pytest.raises(InputError, match=r"hf:some/name:small.* hf download --repo-type dataset some/name$"):
        load_text("hf:some/name:small")


def test_a_bundle_is_evaluated_offline(
    offline: Path, convert_arguments: Callable[..., list[str]], irc_main: Callable[..., Any]
) -> None:
    download(offline)
    arguments = convert_arguments(offline / "bundle", data="hf:some/name")
    del arguments[arguments.index("--data") : arguments.index("--data") + 2]
    converted = irc_main(*arguments)
    assert converted.code == 0, converted.err
    assert "hf:some/name" in converted.err
    assert "Couldn't reach" in converted.err
    evaluated = irc_main("eval", offline / "bundle", "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json["data"] == converted.json["data"]
    assert evaluated.json["perplexity"] == converted.json["perplexity"]
