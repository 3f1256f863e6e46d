"""Text from JSON Lines files, parquet files, and streamed datasets.

Without a connection, a dataset of the hub is read from the cache of `datasets` or of the hub's client, or refused.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from irc.errors import InputError
from irc.text import rows as text_rows
from irc.text.source import Document, load_text

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
    path = _jsonl(tmp_path, '{"text": "a"}\n{"text": null}\n{"other": 1}\n')
    assert [document.text for document in load_text(str(path)).documents] == ["a", "", ""]


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
