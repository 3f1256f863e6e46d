"""Datasets of the hub, without a connection: from what `datasets` prepared, from what was downloaded, else refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from irc.data import load_text
from irc.errors import InputError

datasets = pytest.importorskip("datasets", reason="needs datasets, which comes with the extra data")
LINES = [f"{number} of many lines, with the same few words in each of them" for number in range(1500)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return an empty home of both caches, as with HF_HOME and HF_HUB_OFFLINE=1, which are read once a process."""
    from huggingface_hub import constants

    for module in (datasets.config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path


def parquet(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict({"id": range(len(LINES)), "text": LINES}).to_parquet(path)
    return path


def prepare(home: Path) -> None:
    """Lay down what `datasets.load_dataset("some/name")` leaves."""
    source = parquet(home / "source" / "train.parquet")
    builder = datasets.load_dataset_builder("parquet", data_files={"train": str(source)})
    builder.dataset_name, builder.info.config_name = "name", "default"
    builder.download_and_prepare(str(home / "datasets" / "some___name" / "default" / "0.0.0" / COMMIT))


def download(home: Path, card: str = "license: mit", *, data: bool = True) -> None:
    """Lay down what `hf download --repo-type dataset some/name` leaves; without data, what streaming leaves."""
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
    with pytest.raises(InputError, match=r"in no cache of this machine; .* hf download --repo-type dataset some/name$"):
        load_text("hf:some/name:small")


def test_a_bundle_is_evaluated_offline(
    offline: Path, convert_arguments: Callable[..., list[str]], irc_main: Callable[..., Any]
) -> None:
    download(offline)
    arguments = convert_arguments(offline / "bundle", data="hf:some/name")
    del arguments[arguments.index("--data") : arguments.index("--data") + 2]
    converted = irc_main(*arguments)
    assert converted.code == 0, converted.err
    assert "--data hf:some/name: not from the hub but as it was downloaded (Couldn't reach" in converted.err
    evaluated = irc_main("eval", offline / "bundle", "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json["data"] == converted.json["data"]
    assert evaluated.json["perplexity"] == converted.json["perplexity"]
