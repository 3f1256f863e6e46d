"""`irc export` on a tiny routed model, as a user runs it: what it writes, says and refuses."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import irc
from exporters.onnx_format import MANIFEST
from irc.bundle.layout import RECIPE
from irc.deployment import onnx_folder as export_module
from irc.runtime.folder import open_folder
from irc.runtime.session import Runtime

PROMPT = "def parse(text):\n    "
FILES = {"config.json", "genai_config.json", MANIFEST, "model.onnx", "model.onnx.data", "tokenizer.json"}


def test_what_export_writes_and_says(bundle: Path, copied: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    refused = irc_main("export", bundle, "-o", copied)
    assert refused.code == 2
    assert str(copied) in refused.sentence()
    (copied / "model.onnx").write_bytes(b"")
    shown = irc_main("export", bundle, "-o", copied, "--force", "--json")
    assert shown.code == 0, shown.err
    result = shown.json
    assert result["routed_units"] == 4
    assert result["dtype"] == "fp32"
    assert {path.name for path in copied.iterdir()} >= FILES
    assert (copied / "model.onnx").stat().st_size > 0
    assert {path.name for path in tmp_path.iterdir()} == {"copied"}
    assert (copied / RECIPE).read_text() == (bundle / RECIPE).read_text()
    genai = json.loads((copied / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["num_hidden_layers"] == 2


def test_the_folder_says_what_it_was_made_of(bundle: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    """In `irc.json` with the measured sparsity and without a path of this machine; in the model in its doc string."""
    measured = shutil.copytree(bundle, tmp_path / "bundle")
    config = json.loads((measured / "irc_config.json").read_text())
    config["sparsity"] = {"target": 0.3, "realized": 0.28, "attention": 0.3, "ffn": 0.26}
    (measured / "irc_config.json").write_text(json.dumps(config))
    assert irc_main("export", measured, "-o", tmp_path / "routed").code == 0
    manifest = json.loads((tmp_path / "routed" / MANIFEST).read_text())
    assert (manifest["sparsity"], manifest["dial"], manifest["source"]) == (0.28, None, "../bundle")
    strings = [value for value in (*manifest.values(), *manifest["base"].values()) if isinstance(value, str)]
    assert not any(Path(value).is_absolute() for value in strings)
    model = onnx.load(tmp_path / "routed" / "model.onnx", load_external_data=False)
    assert (model.producer_name, model.producer_version, model.model_version) == ("irc", irc.__version__, 1)
    assert all(part in model.doc_string for part in (manifest["base"]["name"], config["spec"]["policy"], "0.3"))
    assert open_folder(tmp_path / "routed").source == str(measured.resolve())
    verified = irc_main("verify", tmp_path / "routed", "--seq-len", "16", "--tokens", "64", "--json")
    assert verified.json["bundle"] == str(measured.resolve())


def test_a_dense_folder_skips_nothing(model_folder: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    assert irc_main("export", model_folder, "-o", tmp_path / "dense").code == 0
    manifest = json.loads((tmp_path / "dense" / MANIFEST).read_text())
    assert (manifest["sparsity"], manifest["dial"]) == (0.0, None)
    assert manifest["base"]["name"] == model_folder.name


def test_a_folder_for_cuda_says_so_and_runs_on_the_cpu(
    bundle: Path, exported: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    assert irc_main("export", bundle, "-o", tmp_path / "cuda", "--provider", "cuda").code == 0
    made = {}
    for provider, folder in (("cpu", exported), ("cuda", tmp_path / "cuda")):
        assert json.loads((folder / MANIFEST).read_text())["provider"] == provider
        operators = {node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}
        assert ("RoutedMatMul" in operators) == (provider == "cuda")
        made[provider] = irc_main("generate", folder, PROMPT, "-n", "6", "--json").json
    assert made["cpu"]["text"] == made["cuda"]["text"]


def test_triton_layout_describes_the_model_it_holds(bundle: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    assert irc_main("export", bundle, "-o", tmp_path / "triton", "--layout", "triton").code == 0
    config = (tmp_path / "triton" / "irc" / "config.pbtxt").read_text()
    session = Runtime(tmp_path / "triton")._session
    kinds = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    for side, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for value in values:
            sizes = ", ".join(str(size) if isinstance(size, int) else "-1" for size in value.shape)
            line = f'{side} [ {{ name: "{value.name}" data_type: {kinds[value.type]} dims: [ {sizes} ] }} ]'
            assert line in config.splitlines()
    assert config.count("input [") == len(session.get_inputs())
    assert "model_operations" not in config
    assert irc_main("generate", tmp_path / "triton", PROMPT, "-n", "3", "--json").code == 0


def damage(folder: Path, how: str) -> None:
    data, manifest = folder / "model.onnx.data", folder / MANIFEST
    if how == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif how == "altered":
        content = bytearray(data.read_bytes())
        content[1000] ^= 1
        data.write_bytes(content)
    elif how == "missing":
        data.unlink()
    elif how == "newer":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"op_version": 99}))
    else:
        manifest.write_text("{")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("truncated", "the file is truncated or was changed; export again"),
        ("altered", "the file is truncated or was changed; export again"),
        ("missing", "the file is missing; export again"),
        ("newer", "op version 99 is newer than this irc knows (1); upgrade irc"),
        ("manifest", "damaged (JSONDecodeError"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "verify"])
def test_a_damaged_folder_is_refused(
    copied: Path, how: str, sentence: str, verb: str, irc_main: Callable[..., Any]
) -> None:
    damage(copied, how)
    shown = irc_main(verb, copied, *([PROMPT] if verb == "generate" else []))
    assert shown.code == 2
    assert sentence in shown.sentence()
    assert shown.out == ""


def test_what_is_no_folder_of_ours_is_refused(bundle: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    assert "export it first: irc export" in irc_main("generate", bundle, "x").sentence()
    assert "not an ONNX folder of irc" in irc_main("verify", tmp_path).sentence()
    (tmp_path / "notes.txt").write_text("mine")
    shown = irc_main("export", bundle, "-o", tmp_path, "--force")
    assert (shown.code, (tmp_path / "notes.txt").read_text()) == (2, "mine")
    assert "exists and is not an ONNX folder of irc" in shown.sentence()
    assert irc_main("export", tmp_path, "-o", tmp_path / "new").code == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_export_that_failed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, irc_main: Callable[..., Any], error: BaseException
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        (staging,) = (tmp_path / "a").iterdir()
        (staging / "model.onnx.data").write_bytes(b"half")
        raise error

    monkeypatch.setattr(export_module, "export_onnx", fail)
    shown = irc_main("export", bundle, "-o", tmp_path / "a" / "onnx")  # the parent is made, and goes too
    assert shown.code != 0
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        assert shown.code == 1
        assert "could not be written (No space left on device)" in shown.sentence()


def test_a_reduced_model_stores_less(
    bundle: Path, exported: Path, text_file: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    """Its folder has slots and no file of a runtime that knows none; verify and generate follow the policy."""
    shown = irc_main("export", bundle, "-o", tmp_path / "onnx", "--kv-threshold", "0.5", "--json")
    assert shown.code == 0, shown.err
    assert (shown.json["kv_policy"], shown.json["reduced_units"]) == ("reduced", 2)
    assert not (tmp_path / "onnx" / "genai_config.json").exists()
    arguments = ["verify", tmp_path / "onnx", "--data", text_file, "--tokens", "256", "--seq-len", "16"]
    verified = irc_main(*arguments, "--prompts", "6", "--new-tokens", "24", "--json")
    assert verified.code == 0, verified.err
    assert verified.json["generated"]["identical"] == 6
    generated = irc_main("generate", tmp_path / "onnx", PROMPT, "-n", "20", "--json").json
    assert 0 < generated["kv_saved"] < 1
    assert "of keys and values not stored" in irc_main("generate", tmp_path / "onnx", PROMPT, "-n", "4").err
    assert irc_main("generate", exported, PROMPT, "-n", "20", "--json").json["kv_saved"] == 0


@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 100_000, '{"a": 1, "a": 2}'], ids=["cut", "list", "deep", "twice"]
)
def test_a_generation_config_that_cannot_be_used(
    model_folder: Path, tmp_path: Path, irc_main: Callable[..., Any], content: str
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "generation_config.json").write_text(content)
    refused = irc_main("export", folder, "-o", tmp_path / "onnx")
    assert (refused.code, "generation_config.json: cannot be used" in refused.sentence()) == (2, True)
    assert not (tmp_path / "onnx").exists()


def test_the_size_is_that_of_the_files_wherever_the_path_leads(model_folder: Path, tmp_path: Path) -> None:
    result = export_module.export(str(model_folder), tmp_path / "nowhere" / ".." / "onnx")
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "onnx").iterdir()) > 0


def test_weights_that_are_not_numbers_are_not_exported(
    model_folder: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused = irc_main("export", folder, "-o", tmp_path / "onnx")
    assert (refused.code, "model.layers.1.mlp.up_proj.weight" in refused.sentence()) == (2, True)
    assert not (tmp_path / "onnx").exists()


def test_configuration_and_tokenizer_are_copied_and_no_code(
    model_folder: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    for name in ("tokenizer_code.py", "tokenizer.bin", "special_tokens.pkl", "tokenizer.safetensors"):
        (folder / name).write_text("x")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer").mkdir()
    assert irc_main("export", folder, "-o", tmp_path / "onnx").code == 0
    there = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert there >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "onnx" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not {name for name in there if name.endswith((".py", ".bin", ".pkl", ".safetensors")) or name == "tokenizer"}


def test_what_a_configuration_leaves_to_its_default(
    model_folder: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    """As configurations written by hand have it: what transformers fills in, the export knows too."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 32000}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    del written["vocab_size"]
    (folder / "config.json").write_text(json.dumps(written))
    shown = irc_main("export", folder, "-o", tmp_path / "onnx")
    assert shown.code == 0, shown.err
    for name in (MANIFEST, "genai_config.json"):
        assert '"vocab_size": 32000' in (tmp_path / "onnx" / name).read_text()
