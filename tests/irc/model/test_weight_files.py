"""Which files of a folder are the weights, and what is said of a folder that has none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from irc.errors import InputError
from irc.model.checkpoint import BaseModel, find_base

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c\nsize 9\n"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
NOTHING = "no other safetensors"


def shards_in(folder: Path, names: list[str] | None = None) -> Path:
    """Write shards: the first holds w0 = [0.0], the second w1 = [1.0], and so on."""
    for number, name in enumerate(names or SHARDS):
        save_file({f"w{number}": torch.tensor([float(number)])}, folder / name)
    return folder


def index_of(folder: Path, names: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def values(folder: Path) -> dict[str, float]:
    return {name: tensor.item() for name, tensor in BaseModel("m", folder).weights().items()}


@pytest.mark.parametrize("others", [[], SHARDS], ids=["stale index", "complete index"])
def test_the_single_file_is_taken_as_in_transformers(
    tmp_path: Path, others: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    shards_in(tmp_path, others)
    index_of(tmp_path, {f"w{number}": name for number, name in enumerate(SHARDS)})
    save_file({"w0": torch.tensor([7.0])}, tmp_path / "model.safetensors")
    base = BaseModel("m", tmp_path)
    assert {name: tensor.item() for name, tensor in base.weights().items()} == {"w0": 7.0}
    base.sha256()
    (note,) = caplog.messages
    assert "model.safetensors" in note
    assert INDEX in note


def test_shards_without_an_index_are_read(tmp_path: Path) -> None:
    shards_in(tmp_path)
    assert values(tmp_path) == {"w0": 0.0, "w1": 1.0, "w2": 2.0}
    without = BaseModel("m", tmp_path).sha256()
    index_of(tmp_path, {f"w{number}": name for number, name in enumerate(SHARDS)})
    assert BaseModel("m", tmp_path).sha256() == without


@pytest.mark.parametrize("indexed", [False, True])
def test_a_shard_that_is_missing_is_named(tmp_path: Path, indexed: bool) -> None:
    shards_in(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    if indexed:
        index_of(tmp_path, {f"w{number}": name for number, name in enumerate(SHARDS)})
    with pytest.raises(InputError, match=rf"^m: {SHARDS[1]} is missing.* 3 shards"):
        values(tmp_path)


def test_two_sets_of_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    shards_in(tmp_path, [*SHARDS, "model-00001-of-00002.safetensors"])
    with pytest.raises(InputError, match=r"00002.*00003"):
        values(tmp_path)


def test_a_weight_in_two_shards_without_an_index_is_refused(tmp_path: Path) -> None:
    shards_in(tmp_path)
    save_file({"w0": torch.tensor([9.0]), "w2": torch.tensor([2.0])}, tmp_path / SHARDS[2])
    with pytest.raises(InputError, match=rf"{SHARDS[2]}: holds w0, which {SHARDS[0]}"):
        values(tmp_path)
    index_of(tmp_path, {f"w{number}": name for number, name in enumerate(SHARDS)})
    assert values(tmp_path)["w0"] == 9.0  # as in transformers, the last one


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], ["adapter_config.json", "merge_and_unload"]),
        (["global_step4/mp_rank_00_model_states.pt", "training_args.bin"], ["global_step4", "zero_to_fp32"]),
        (["global_step4/mp_rank_00_model_states.pt", "zero_to_fp32.py"], ["zero_to_fp32"]),
        (["pytorch_model_fsdp_0/__0_0.distcp"], ["pytorch_model_fsdp_0", "accelerate merge-weights"]),
        (["model.fp16.safetensors"], ["model.fp16.safetensors", "variant"]),
        (["model.fp16-00001-of-00002.safetensors"], ["model.fp16-00001-of-00002.safetensors", "variant"]),
        (["model-00001-of-00002.fp16.safetensors"], ["model-00001-of-00002.fp16.safetensors", "variant"]),
        (["adapter_model.safetensors"], ["adapter_model.safetensors", "merge_and_unload"]),
        (["weights.safetensors"], ["weights.safetensors"]),
        (["b.safetensors", "a.safetensors"], ["a.safetensors and 1 more"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["pytorch_model-00001-of-00002.bin"], ["pytorch_model-00001-of-00002.bin", "pickled"]),
        (["m.Q4_K_M.gguf"], ["m.Q4_K_M.gguf", "GGUF"]),
        (["checkpoint-500/config.json"], ["checkpoint-500"]),
        (["training_args.bin", "optimizer.bin", "rng_state.pth"], [NOTHING]),
    ],
)
@pytest.mark.parametrize("configured", [False, True])
def test_what_is_there_instead_is_told(tmp_path: Path, files: list[str], said: list[str], configured: bool) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    if configured:
        (tmp_path / "config.json").write_text("{}")
        said = ["model.safetensors is missing", *said]
    elif said == [NOTHING] or files[-1] in ("weights.safetensors", "a.safetensors"):
        said = ["no config.json"]
    with pytest.raises(InputError) as caught:
        _ = find_base(str(tmp_path)).shards
    for part in said:
        assert part in str(caught.value)
    assert ("pickle" in str(caught.value)) == files[0].startswith("pytorch_model-")


def test_the_first_file_of_an_index_is_named_if_none_is_there(tmp_path: Path) -> None:
    index_of(tmp_path, {"w": "model-00001-of-00030.safetensors"})
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        InputError, match=r"model-00001-of-00030\.safetensors is missing; pytorch_model\.bin is pickled"
    ):
        values(tmp_path)


def test_an_adapter_beside_the_weights_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert values(tmp_path) == {"w": 1.0}
    (note,) = caplog.messages
    assert "adapter_config.json" in note


@pytest.mark.parametrize(
    "file",
    ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "model.safetensors", INDEX],
)
def test_a_git_lfs_pointer_is_told(model_folder: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    if file == INDEX:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(POINTER)
    base = find_base(str(folder))
    with pytest.raises(InputError, match=rf"{file}.*git lfs pull"):
        _ = base.config, base.tokenizer, base.weights()


def test_a_pointer_that_nobody_reads_does_no_harm(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "pytorch_model.bin").write_text(POINTER)
    base = find_base(str(folder))
    assert len(base.weights()) == len(find_base(str(model_folder)).weights())
    assert base.tokenizer("a")["input_ids"] == find_base(str(model_folder)).tokenizer("a")["input_ids"]


def test_the_files_of_a_hub_model_that_are_downloaded(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        *("config.json", "generation_config.json", INDEX, *SHARDS, "tokenizer.json", "tokenizer.model"),
        *("spiece.model", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    ]
    left = [
        *("pytorch_model.bin", "consolidated.safetensors", "checkpoint-5/model.safetensors", "modeling.py"),
        *("original/consolidated.00.pth", "README.md", "model.gguf"),
    ]
    asked: list[str] = []

    def download(name: str, **options: object) -> str:
        patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
        asked.extend(filter_repo_objects([*wanted, *left], **patterns))
        return str(model_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_base("org/name").folder == model_folder
    assert sorted(asked) == sorted(wanted)
