"""The recipe in a bundle: `irc eval` follows it, checks it, and says if it is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Arguments = Callable[..., list[str]]


@pytest.fixture
def bundle(irc_main: Callable[..., Any], convert_arguments: Arguments, tmp_path: Path) -> Path:
    made = irc_main(*convert_arguments(tmp_path / "b"), "--sparsity", "0.4")
    assert made.code == 0, made.err
    return tmp_path / "b"


def test_the_target_is_that_of_the_bundle(bundle: Path, irc_main: Callable[..., Any], text_file: Path) -> None:
    assert irc_main("eval", bundle, "--json").json["sparsity"]["target"] == 0.4
    (bundle / "recipe.yaml").unlink()
    given = ("--data", text_file, "--seq-len", "16", "--json")
    assert irc_main("eval", bundle, *given).json["sparsity"]["target"] == 0.4


def test_training_options_of_earlier_versions_do_no_harm(bundle: Path, irc_main: Callable[..., Any]) -> None:
    before = irc_main("eval", bundle, "--json").json
    path = bundle / "recipe.yaml"
    path.write_text(path.read_text().replace("router:\n", "router:\n  clip: 1.0\n  budget: flops\n"))
    assert "budget: flops" in path.read_text()
    assert irc_main("eval", bundle, "--json").json["perplexity"] == before["perplexity"]
    made_again = irc_main("convert", "--recipe", path, "-o", bundle.with_name("again"))
    assert made_again.code == 2
    assert "router.clip is 1.0, but the field was removed" in made_again.sentence()


@pytest.mark.parametrize("content", [None, "{}"])
def test_without_it_the_text_must_be_named(bundle: Path, irc_main: Callable[..., Any], content: str | None) -> None:
    (bundle / "recipe.yaml").unlink()
    if content is not None:
        (bundle / "recipe.yaml").write_text(content)
    shown = irc_main("eval", bundle)
    assert shown.code == 2
    assert "recipe.yaml" in shown.sentence()
    assert "--data" in shown.sentence()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("seq_len: 0", r"seq_len .*\b0"),
        ("seq_len: -5", "seq_len .*-5"),
        ("eval_tokens: -3", "eval_tokens .*-3"),
        ("sparsity: .nan", "sparsity .*nan"),
    ],
)
def test_values_that_cannot_be_are_refused(bundle: Path, irc_main: Callable[..., Any], setting: str, said: str) -> None:
    path = bundle / "recipe.yaml"
    key = setting.partition(":")[0]
    path.write_text("\n".join(setting if line.startswith(f"{key}:") else line for line in path.read_text().split("\n")))
    shown = irc_main("eval", bundle)
    assert shown.code == 2
    assert re.search(f"recipe.yaml: .*{said}", shown.sentence())


def test_a_link_out_of_the_bundle_is_not_read(bundle: Path, irc_main: Callable[..., Any], tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("- whatever")
    (bundle / "recipe.yaml").unlink()
    (bundle / "recipe.yaml").symlink_to(secret)
    for verb in ("eval", "inspect"):
        shown = irc_main(verb, bundle)
        assert (shown.code, str(bundle / "recipe.yaml") in shown.sentence()) == (2, True)


def test_passes_are_not_dumped_into_what_is_replaced(
    bundle: Path, irc_main: Callable[..., Any], tmp_path: Path
) -> None:
    onnx = tmp_path / "onnx"
    for place in (onnx, onnx / "dump", onnx / ".." / "onnx" / "x"):
        shown = irc_main("export", bundle, "-o", onnx, "--dump-dir", place)
        assert (shown.code, str(place) in shown.sentence()) == (2, True)
    assert not onnx.exists()
