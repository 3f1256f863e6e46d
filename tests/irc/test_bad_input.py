"""Every bad input of `irc convert` and `irc eval`: one line that names it, the right exit code, nothing written."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Arguments = Callable[..., list[str]]


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be damaged."""
    return shutil.copytree(model_folder, tmp_path / "model")


def with_data(arguments: list[str], data: str | Path) -> list[str]:
    return [*arguments[: arguments.index("--data") + 1], str(data), *arguments[arguments.index("--data") + 2 :]]


def refused(irc_main: Any, arguments: list[str], output: Path, *parts: str, code: int = 2) -> None:
    before = sorted(output.parent.rglob("*"))
    done = irc_main(*arguments)
    assert done.code == code, done.err
    assert done.out == ""
    sentence = done.sentence()
    for part in parts:
        assert part in sentence, sentence
    assert sorted(output.parent.rglob("*")) == before


TEXTS: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "blank": b" \n\n\t\n",
    "short": b"short",
    "binary": b"\xff\xfe\x00\x81" * 100,
}


@pytest.mark.parametrize("which", TEXTS)
@pytest.mark.parametrize("verb", ["convert", "eval"])
def test_text_that_cannot_be_used(
    irc_main: Any, convert_arguments: Arguments, model_folder: Path, tmp_path: Path, which: str, verb: str
) -> None:
    content = TEXTS[which]
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_bytes(content)
    output = tmp_path / "b"
    if verb == "convert":
        refused(irc_main, with_data(convert_arguments(output), data), output, data.name)
    else:
        refused(irc_main, ["eval", str(model_folder), "--data", str(data), "--json"], output, data.name)


@pytest.mark.parametrize("content", ["", "{}", '{"body": "x"}', "[1]", "no json"])
def test_rows_without_text(irc_main: Any, convert_arguments: Arguments, tmp_path: Path, content: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    refused(irc_main, with_data(convert_arguments(tmp_path / "b"), data), tmp_path / "b", "data.jsonl")


def test_an_empty_folder_of_text(irc_main: Any, convert_arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    arguments = with_data(convert_arguments(tmp_path / "b"), tmp_path / "texts")
    refused(irc_main, arguments, tmp_path / "b", "texts")


def set_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def eight_bits(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors", {"format": "pt"})


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lack_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def lack_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def junk_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("[]")


MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("model.safetensors",)),
    "only .bin": (only_pickles, (".bin",)),
    "NaN": (set_nan, ("model.layers.1.mlp.up_proj.weight", "NaN")),
    "truncated": (truncate, ("model.safetensors",)),
    "a weight lacks": (lack_a_weight, ("model.layers.1.mlp.up_proj.weight",)),
    "a shard lacks": (lack_a_shard, ("model-00001-of-00002.safetensors",)),
    "junk index": (junk_index, ("model.safetensors.index.json",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json",)),
    "junk config": (lambda f: (f / "config.json").write_text("{"), ("config.json",)),
    "unknown type": (change_config(model_type="nosuch"), ("config.json", "nosuch")),
    "remote code": (
        change_config(model_type="nosuch", auto_map={"AutoConfig": "x.Y"}),
        ("config.json",),
    ),
    "not causal": (change_config(model_type="bert", architectures=["BertModel"]), ("bert",)),
    "other architecture": (
        change_config(model_type="cohere"),
        ("cohere",),
    ),
    "layers of a part": (
        change_config(model_type="gemma3", text_config={"num_hidden_layers": 10**9}),
        ("gemma3",),
    ),
    "layers": (change_config(model_type="gemma3_text", num_hidden_layers=10**9), ("num_hidden_layers", "1000000000")),
    "experts": (change_config(model_type="mixtral", num_local_experts=10**9), ("config.json", "num_experts")),
    "quantized": (
        change_config(quantization_config={"quant_method": "fp8"}),
        ("fp8",),
    ),
    "weights of 8 bits": (eight_bits, ("mlp.up_proj.weight", "float8_e4m3fn")),
    "another config": (change_config(configuration_files=["config.4.0.json"]), ("config.json",)),
    "other shape": (change_config(intermediate_size=40), ("mlp",)),
    "small vocabulary": (change_config(vocab_size=100), ("99",)),
    "no tokenizer": (
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        ("tokenizer",),
    ),
}


@pytest.mark.parametrize("which", MODELS)
def test_models_that_cannot_be_used(
    irc_main: Any, convert_arguments: Arguments, copied: Path, tmp_path: Path, which: str
) -> None:
    damage, parts = MODELS[which]
    damage(copied)
    arguments = convert_arguments(tmp_path / "b")
    arguments[1] = str(copied)
    refused(irc_main, arguments, tmp_path / "b", *parts)


def test_a_model_that_is_nowhere(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("/no/such/folder", "nobody/nothing"):
        arguments = convert_arguments(tmp_path / "b")
        arguments[1] = name
        refused(irc_main, arguments, tmp_path / "b", name)


SETTINGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "sparsity above": (["--sparsity", "1.5"], ("--sparsity", "1.5", "0 to 1")),
    "sparsity below": (["--sparsity", "-0.1"], ("--sparsity", "-0.1")),
    "sparsity nan": (["--sparsity", "nan"], ("--sparsity", "nan")),
    "sparsity text": (["--sparsity", "much"], ("--sparsity", "much")),
    "rank": (["--rank", "33"], ("33", "32")),
    "negative rank": (["--rank", "-1"], ("--rank", "-1")),
    "context": (["--seq-len", "65"], ("65", "64")),
    "one token": (["--seq-len", "1"], ("--seq-len",)),
    "unknown key": (["--set", "router.stepps=5"], ("--set", "router.stepps", "router.steps?")),
    "unknown part": (["--set", "routr.steps=5"], ("--set", "routr.steps", "router?")),
    "nothing below": (["--set", "data.seq_len=5"], ("--set", "data.seq_len")),
    "no YAML": (["--set", "seed={"], ("--set seed={",)),
    "digits": (["--set", "seed=" + 5000 * "9"], ("--set seed=9",)),
    "no value": (["--set", "router.steps"], ("--set router.steps", "key=value")),
    "wrong type": (["--set", "router.steps=many"], ("--set", "router.steps", "'many'")),
    "whole part": (["--set", "router=5"], ("--set", "router", "5")),
    "no windows": (["--set", "router.batch_size=0"], ("--set", "router.batch_size is 0", "at least 1")),
    "weights without texts": (
        ["--data-weights", "1,2"],
        ("--data-weights", "data_weights are [1.0, 2.0]", "each text"),
    ),
    "weights of nothing": (["--data-weights", "0"], ("--data-weights", "one of them above 0")),
    "weights that are words": (["--data-weights", "a,b"], ("--data-weights", "'a,b' is not a list of numbers")),
    "no batch": (["--set", "lff.batch_size=0"], ("lff.batch_size is 0", "at least 1")),
    "no lora rank": (["--set", "lora.rank=0"], ("lora.rank is 0", "at least 1")),
    "stages": (["--stages", "router"], ("router", "lff, router")),
    "no router": (["--stages", "lff,lora"], ("router", "lff, router")),
    "unknown stage": (["--stages", "lff,train"], ("--stages", "'train'", "lff, router, lora")),
    "order": (["--stages", "lff,lora,router"], ("--stages", "lff, lora, router", "lff, router, lora")),
    "policy": (["--policy", "greedy"], ("--policy", "greedy", "informed")),
    "reads": (["--set", "router.reads=all"], ("router.reads is 'all'", "bottleneck")),
    "bottleneck": (["--policy", "skipgpt", "--set", "router.reads=bottleneck"], ("bottleneck", "skipgpt")),
    "budget": (["--set", "router.budget=unit"], ("router.budget is 'unit'", "removed")),
    "ascent": (["--set", "router.lr=-1"], ("router.lr is -1", "at least 0")),
    "clip": (["--set", "router.clip=1"], ("router.clip is 1", "removed")),
    "no recipe": (["--recipe", "nowhere.yaml"], ("nowhere.yaml", "llama-3.2-1b")),
}


@pytest.mark.parametrize("which", SETTINGS)
def test_settings_that_cannot_be_used(irc_main: Any, convert_arguments: Arguments, tmp_path: Path, which: str) -> None:
    flags, parts = SETTINGS[which]
    refused(irc_main, [*convert_arguments(tmp_path / "b"), *flags], tmp_path / "b", *parts)


@pytest.mark.parametrize(
    ("content", "part"),
    [("sparsty: 0.2", "sparsity?"), ("- 1", "keys and values"), ("{", ""), ("seq_len: 0", "seq_len is 0")],
)
def test_recipes_that_cannot_be_used(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path, content: str, part: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    refused(
        irc_main, [*convert_arguments(tmp_path / "b"), "--recipe", str(path)], tmp_path / "b", f"recipe {path}: ", part
    )


@pytest.mark.parametrize("what", ["bundle", "folder of other things", "file"])
@pytest.mark.parametrize("flag", [None, "--force", "--resume"])
def test_outputs_that_exist(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path, what: str, flag: str | None
) -> None:
    """Only a bundle may be replaced, and only when asked: a mistyped path must not cost a folder."""
    output = tmp_path / "b"
    if what == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / ("irc_config.json" if what == "bundle" else "thesis.txt")).write_text("{}")
    arguments = [*convert_arguments(output, lff__steps=0, router__steps=1), *([flag] if flag else [])]
    if what == "bundle" and flag:
        assert irc_main(*arguments).code == 0
        assert (output / "metrics.json").is_file()
    else:
        refused(irc_main, arguments, output, str(output))


def test_an_output_whose_place_cannot_be_written(irc_main: Any, convert_arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(irc_main, convert_arguments(tmp_path / "file" / "b"), tmp_path / "b", str(tmp_path / "file"))


def test_a_full_disk_at_the_end_keeps_the_work(
    irc_main: Any, convert_arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    output = tmp_path / "b"
    with monkeypatch.context() as patch:
        patch.setattr("irc.bundle.saving._write", full)
        failed = irc_main(*convert_arguments(output))
    assert (failed.code, output.exists()) == (1, False)
    assert "No space left on device" in failed.sentence()
    assert "--resume" in failed.sentence()
    assert irc_main(*convert_arguments(output), "--resume").code == 0
    assert (output / "metrics.json").is_file()


@pytest.mark.parametrize("place", ["router", "early"])
def test_ctrl_c_leaves_no_half_bundle(start_irc: Any, convert_arguments: Arguments, tmp_path: Path, place: str) -> None:
    process = start_irc(convert_arguments(tmp_path / "b", router__steps=5000))
    name = "router.checkpoint.safetensors" if place == "router" else "recipe.yaml"
    while not (tmp_path / "b.partial" / name).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    told = err.rstrip().splitlines()[-1]
    assert told.startswith("error: interrupted")
    if place == "router":
        assert "stage router, router " in told
        assert "/5000;" in told
        assert f"-o {tmp_path / 'b'} " in told
        assert told.endswith(" --resume")
    assert not (tmp_path / "b").exists()
    assert not list(tmp_path.rglob("*.tmp"))
