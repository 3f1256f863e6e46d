"""ONNX folders that were altered, and options out of range: one sentence and exit code 2 for each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from irc.deployment.verification import tolerance_of
from irc.errors import InputError
from irc.files.atomic import file_sha256
from irc.runtime.generation import Generator
from irc.runtime.session import Runtime
from irc.text.tokenizer import TextTokenizer

Edit = Callable[[dict[str, Any]], object]
UNIT = "model.layers.0.mlp"  # the second of four


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


EDITS: dict[str, tuple[Edit, str]] = {
    "dtype": (lambda m: m.update(dtype="int4"), "dtype is 'int4'"),
    "another dtype": (
        lambda m: m.update(dtype="fp16"),
        "past_key_values.0.key",
    ),
    "layers": (lambda m: m["cache"].update(layers=1), "the model has 4 cache inputs, irc.json describes 2"),
    "layers as text": (lambda m: m["cache"].update(layers="x"), "not made of whole numbers"),
    "context": (lambda m: m.update(context_length="many"), "context_length is 'many'"),
    "no version": (lambda m: m.update(format_version=0), "format_version is 0"),
    "infinite version": (lambda m: m.update(op_version=float("inf")), "damaged"),
    "newer operators": (lambda m: m.update(op_version=99), "op version 99 is newer than this irc knows"),
    "hash of another folder": (lambda m: m["sha256"].update({"../x": "0"}), "'../x'"),
    "hash of a name too long for a file": (lambda m: m["sha256"].update({"9" * 300: "0"}), "'9999"),
    "hash that is no text": (lambda m: m["sha256"].update(x=1), "a hash is not text"),
    "unit": (lambda m: m["units"][0].pop("difference"), "damaged"),
    "half of the units": (
        lambda m: m.update(units=m["units"][::2]),
        f"irc.json: lists 2 of the model's 4 routed units, {UNIT} is missing",
    ),
    "no unit": (lambda m: m["units"].clear(), "lists 0 of the model's 4 routed units"),
    "a unit twice": (lambda m: m["units"].append(m["units"][1]), f"unit {UNIT} is listed twice"),
    "a unit of another model": (
        lambda m: m["units"].append({"unit": "x", "difference": "x.logit_difference"}),
        "irc.json: unit x is not one that the model routes",
    ),
    "a value that is no decision": (lambda m: m["units"][1].update(difference="logits"), f"unit {UNIT} is not one"),
    "another name of a unit": (lambda m: m["units"][1].update(unit="x"), "unit x is not one that the model routes"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_manifest_that_was_edited(folder: Path, irc_main: Callable[..., Any], name: str) -> None:
    edit, expected = EDITS[name]
    manifest = json.loads((folder / "irc.json").read_text())
    edit(manifest)
    (folder / "irc.json").write_text(json.dumps(manifest))
    outcome = irc_main("generate", folder, "def f(")
    assert (outcome.code, outcome.out) == (2, "")
    assert expected in outcome.sentence()


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "tokenizer.json", "generation_config.json"])
def test_a_git_lfs_pointer_in_place_of_a_file(folder: Path, irc_main: Callable[..., Any], file: str) -> None:
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c\nsize 9\n")
    outcome = irc_main("generate", folder, "def f(")
    assert outcome.code == 2
    assert file in outcome.sentence()
    assert "git lfs pull" in outcome.sentence()


@pytest.mark.parametrize(
    "name", ["input_ids", "/norm/RMSNormalization_output_0", "lm_head.weight"], ids=["input", "value", "tensor"]
)
def test_names_in_the_model_that_are_not_text(folder: Path, exported: Path, name: str) -> None:
    """A name is decoded when it is read, long after the file was."""
    content = (folder / "model.onnx").read_bytes()
    assert name.encode() in content
    (folder / "model.onnx").write_bytes(content.replace(name.encode(), b"\xf3" + name.encode()[1:]))
    manifest = json.loads((folder / "irc.json").read_text())
    manifest["sha256"]["model.onnx"] = file_sha256(folder / "model.onnx")
    (folder / "irc.json").write_text(json.dumps(manifest))
    if name == "input_ids":
        with pytest.raises(InputError, match="decode"):
            Runtime(folder, "cpu")
        return
    # ONNX Runtime compares names inside the graph as bytes: the same graph by other names.
    ids, mask = np.arange(8)[None], np.ones((1, 8), np.int64)
    steps = [runtime.step(ids, mask, runtime.empty_cache(1)) for runtime in (Runtime(folder), Runtime(exported))]
    np.testing.assert_array_equal(steps[0].logits, steps[1].logits)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "tokenizer_config.json"])
def test_a_damaged_configuration(folder: Path, irc_main: Callable[..., Any], name: str) -> None:
    (folder / name).write_text("{")
    outcome = irc_main("generate", folder, "def f(")
    assert (outcome.code, str(folder) in outcome.sentence()) == (2, True)
    assert name in outcome.sentence()


def test_a_folder_that_is_missing(folder: Path, irc_main: Callable[..., Any]) -> None:
    outcome = irc_main("generate", folder / "no", "x")
    assert (outcome.code, str(folder / "no") in outcome.sentence()) == (2, True)


OPTIONS = [
    (("generate", "{folder}", "x", "--temperature", "nan"), "temperature is nan; give 0 (greedy)"),
    (("generate", "{folder}", "x", "--temperature", "inf"), "temperature is inf"),
    (("generate", "{folder}", "x", "--temperature", "1e-320"), "temperature is 1e-320"),
    (("verify", "{folder}", "--tolerance", "nan"), "tolerance is nan"),
    (("verify", "{folder}", "--tolerance", "-1"), "tolerance is -1.0"),
    (("verify", "{folder}", "--seq-len", "600"), "the model's context is 64; give at most 64"),
    (("verify", "{folder}", "--seq-len", "32", "--new-tokens", "500"), "give at most 48"),
    (("bench", "--sparsities", ""), "--sparsities"),
    (("bench", "--hidden", "10", "--heads", "2", "--kv-heads", "2"), "heads 2"),
    (("export", "demo", "-o", "."), "is the working folder"),
]


@pytest.mark.parametrize(("arguments", "expected"), OPTIONS, ids=lambda value: " ".join(value)[:50])
def test_options_out_of_range(
    exported: Path,
    irc_main: Callable[..., Any],
    arguments: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = irc_main(*(argument.format(folder=exported) for argument in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert expected in outcome.sentence()


def test_a_tokenizer_of_more_ids_than_the_model_has(folder: Path, irc_main: Callable[..., Any]) -> None:
    """It is refused before the prompt is shown: an error would stand on its line."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    outcome = irc_main("generate", folder, "def <more>")
    assert (outcome.code, outcome.out) == (2, "")
    assert "makes the id 257 of the prompt, the model's vocabulary ends at 256" in outcome.sentence()


def test_verify_says_where_to_look_for_a_bundle_that_moved(folder: Path, irc_main: Callable[..., Any]) -> None:
    manifest = json.loads((folder / "irc.json").read_text())
    (folder / "irc.json").write_text(json.dumps(manifest | {"source": "/gone/bundle"}))
    outcome = irc_main("verify", folder, "--seq-len", "16")
    assert (outcome.code, "/gone/bundle" in outcome.sentence()) == (2, True)


def test_text_goes_out_as_it_is(exported: Path, irc_main: Callable[..., Any]) -> None:
    prompt = "class A:\n\tdef f(self):\r\n\t\tx\x07 [bold]"
    outcome = irc_main("generate", exported, prompt, "-n", "4")
    assert outcome.out.startswith(prompt)


def test_a_space_that_begins_the_continuation_is_kept(exported: Path) -> None:
    """Tokenizers of Llama 2's kind drop the space of a text's first token."""
    words = {"▁the": 0, "▁model": 1, ",": 2, "<unk>": 3}
    plain = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    generator = Generator(Runtime(exported))
    generator.tokenizer = TextTokenizer(plain, {})
    assert generator.tokenizer.decode([1, 2]) == "model,"
    assert generator._text_after([0], [1, 2]) == " model,"


def test_half_a_character_before_the_continuation(exported: Path) -> None:
    generator = Generator(Runtime(exported))
    ids = generator.tokenizer.encode("é")
    assert len(ids) == 2
    assert generator._text_after(ids[:1], [*ids[1:], *generator.tokenizer.encode("x")]).endswith("x")


def test_tolerances_grow_with_the_logits_of_16_bit_types() -> None:
    assert tolerance_of("fp32", 100.0) == 1e-4
    assert tolerance_of("fp16", 20.0) == 8 * 2**-10 * 16
    assert tolerance_of("bf16", 0.1) == 8 * 2**-7
