"""Weights of captured models, and what capture refuses."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    CLIPConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    T5Config,
)

from irc.errors import InputError
from irc.model.capture import assign_weights, capture
from irc.model.checkpoint import BaseModel, find_base

SMALL: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


class Lazy(Mapping[str, torch.Tensor]):
    """Makes a new tensor for every look-up, as a checkpoint opened lazily does."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _random(graph: torch.nn.Module, tied: bool) -> dict[str, torch.Tensor]:
    shapes = {name: parameter.shape for name, parameter in graph.named_parameters(remove_duplicate=False)}
    return {name: torch.randn(shape) for name, shape in shapes.items() if not (tied and name == "lm_head.weight")}


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "irc.model.capture"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_weights_are_assigned_not_copied(tiny: Callable, family: str) -> None:
    model = tiny(family)
    state = model.eager.state_dict()
    assign_weights(model.captured, state)
    parameters = dict(model.graph.named_parameters(remove_duplicate=False))
    assert parameters.keys() == state.keys()
    for name, parameter in parameters.items():
        assert parameter.data_ptr() == state[name].data_ptr(), name
        assert not parameter.requires_grad


def test_tied_weights_are_one_parameter_even_if_the_checkpoint_holds_one_name() -> None:
    captured = capture(LlamaConfig(**SMALL, tie_word_embeddings=True), torch.float32)
    weights = _random(captured.graph, tied=True)
    assert "lm_head.weight" not in weights
    assign_weights(captured, weights)
    graph = captured.graph
    assert graph.get_parameter("lm_head.weight") is graph.get_parameter("model.embed_tokens.weight")


def test_tied_weights_are_one_parameter_if_the_checkpoint_holds_both_names(caplog: pytest.LogCaptureFixture) -> None:
    captured = capture(LlamaConfig(**SMALL, tie_word_embeddings=True), torch.float32)
    weights = _random(captured.graph, tied=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    assign_weights(captured, weights)
    embedding = captured.graph.get_parameter("model.embed_tokens.weight")
    assert captured.graph.get_parameter("lm_head.weight") is embedding
    assert embedding.data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    assert _told(caplog) == []


def test_tied_weights_that_differ_are_refused() -> None:
    """transformers would not tie them, whatever its configuration says."""
    captured = capture(LlamaConfig(**SMALL, tie_word_embeddings=True), torch.float32)
    weights = _random(captured.graph, tied=False)
    with pytest.raises(InputError, match=r"lm_head\.weight .*model\.embed_tokens\.weight.*tie_word_embeddings"):
        assign_weights(captured, weights)


def test_a_tied_weight_of_another_type_is_another_one() -> None:
    captured = capture(LlamaConfig(**SMALL, tie_word_embeddings=True), torch.float32)
    weights = _random(captured.graph, tied=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].half()
    with pytest.raises(InputError, match=r"lm_head\.weight .*model\.embed_tokens\.weight"):
        assign_weights(captured, weights)


@pytest.mark.parametrize("lost", ["model.embed_tokens.weight", "lm_head.weight"])
def test_one_of_two_tied_weights_is_enough(lost: str) -> None:
    captured = capture(LlamaConfig(**SMALL, tie_word_embeddings=True), torch.float32)
    weights = _random(captured.graph, tied=False)
    kept = weights["lm_head.weight" if "embed" in lost else "model.embed_tokens.weight"]
    del weights[lost]
    assign_weights(captured, weights)
    for name in ("lm_head", "model.embed_tokens"):
        assert torch.equal(captured.graph.get_submodule(name).weight, kept)


def test_without_either_of_two_tied_weights_it_is_refused() -> None:
    captured = capture(LlamaConfig(**SMALL, tie_word_embeddings=True), torch.float32)
    weights = _random(captured.graph, tied=False)
    del weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight"):
        assign_weights(captured, weights)


def test_weights_that_the_model_does_not_read_are_told(caplog: pytest.LogCaptureFixture) -> None:
    captured = capture(LlamaConfig(**SMALL), torch.float32)
    weights = _random(captured.graph, tied=False)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # as checkpoints of long ago have it
    assign_weights(captured, weights)
    assert _told(caplog) == []
    captured = capture(LlamaConfig(**SMALL), torch.float32)
    weights |= {f"model.layers.0.self_attn.{name}_proj.bias": torch.ones(8) for name in "qkvo"}
    assign_weights(captured, weights)
    (warning,) = _told(caplog)
    assert warning.startswith("4 weights")
    for part in ("llama", *(f"model.layers.0.self_attn.{name}_proj.bias" for name in "koq")):
        assert part in warning


def test_untied_weights_stay_apart() -> None:
    captured = capture(LlamaConfig(**SMALL, tie_word_embeddings=False), torch.float32)
    weights = _random(captured.graph, tied=False)
    assign_weights(captured, weights)
    for name, parameter in captured.graph.named_parameters():
        torch.testing.assert_close(parameter.data, weights[name], rtol=0, atol=0)


def test_lazy_checkpoint_of_another_dtype_gives_every_weight_its_own_values() -> None:
    """Each tensor is freed after its conversion; the next may well get the same address."""
    captured = capture(LlamaConfig(**SMALL, tie_word_embeddings=False), torch.bfloat16)
    weights = _random(captured.graph, tied=False)
    assign_weights(captured, Lazy(weights))
    for name, parameter in captured.graph.named_parameters():
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(parameter.data, weights[name].bfloat16(), rtol=0, atol=0)


def test_rotary_frequencies_stay_fp32_in_a_bf16_model(tiny: Callable) -> None:
    model = tiny("llama", torch.bfloat16)
    buffers = dict(model.graph.named_buffers())
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    assert {buffer.device.type for buffer in buffers.values()} == {"cpu"}
    expected = model.eager.get_buffer("model.rotary_emb.inv_freq")
    torch.testing.assert_close(buffers["model.rotary_emb.inv_freq"], expected, rtol=0, atol=0)


def test_missing_weight_is_refused() -> None:
    captured = capture(LlamaConfig(**SMALL), torch.float32)
    weights = _random(captured.graph, tied=False)
    del weights["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(InputError) as caught:
        assign_weights(captured, weights)
    assert str(caught.value) == (
        "weight model.layers.0.mlp.up_proj.weight is missing from the checkpoint; expected [8, 8]"
    )


def test_missing_tied_weight_is_refused_by_the_stored_name() -> None:
    captured = capture(LlamaConfig(**SMALL, tie_word_embeddings=True), torch.float32)
    weights = _random(captured.graph, tied=True)
    del weights["model.embed_tokens.weight"]
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight"):
        assign_weights(captured, weights)


def test_wrong_shape_is_refused() -> None:
    captured = capture(LlamaConfig(**SMALL), torch.float32)
    weights = _random(captured.graph, tied=False)
    weights["model.norm.weight"] = torch.zeros(9)
    with pytest.raises(InputError, match=r"model\.norm\.weight .*\[9\].*\[8\]"):
        assign_weights(captured, weights)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rename", [lambda name: name.removeprefix("model."), lambda name: f"model.{name}"])
def test_names_without_or_with_two_prefixes_are_those_of_transformers(
    tmp_path: Path, rename: Callable[[str], str], tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = LlamaConfig(**SMALL, tie_word_embeddings=tied)
    captured = capture(config, torch.float32)
    weights = {rename(name): weight for name, weight in _random(captured.graph, tied).items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config.save_pretrained(tmp_path)
    expected = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assign_weights(captured, BaseModel("renamed", tmp_path).weights())
    for name, parameter in captured.graph.named_parameters():
        torch.testing.assert_close(parameter.data, expected[name], rtol=0, atol=0)
    assert _told(caplog) == []


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_a_prefix_that_transformers_does_not_know_is_named(prefix: str) -> None:
    captured = capture(LlamaConfig(**SMALL), torch.float32)
    weights = {prefix + name: weight for name, weight in _random(captured.graph, tied=False).items()}
    with pytest.raises(InputError, match=rf"model\.embed_tokens\.weight .* prefix {prefix} "):
        assign_weights(captured, weights)


def _dynamic_rope(kind: str) -> PretrainedConfig:
    factors = {"long_factor": [1.0] * 2, "short_factor": [1.0] * 2, "original_max_position_embeddings": 16}
    extra = factors if kind == "longrope" else {}
    return LlamaConfig(**SMALL, rope_scaling={"rope_type": kind, "factor": 2.0, **extra})


REFUSED = {
    "encoder-decoder": (T5Config, "t5"),
    "dynamic": (lambda: _dynamic_rope("dynamic"), "'dynamic'"),
    "longrope": (lambda: _dynamic_rope("longrope"), "'longrope'"),
    "dynamic in some layers": (
        lambda: Gemma3TextConfig(
            **SMALL,
            head_dim=4,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
            },
        ),
        "'dynamic'",
    ),
    "no language model": (CLIPConfig, "clip"),
    "no cache": (
        lambda: BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1),
        "bert",
    ),
}


@pytest.mark.parametrize(("config", "name"), REFUSED.values(), ids=list(REFUSED))
def test_refused_in_one_sentence(config: Callable[[], PretrainedConfig], name: str) -> None:
    with pytest.raises(InputError) as caught:
        capture(config(), torch.float32)
    sentence = str(caught.value)
    assert name in sentence
    assert "\n" not in sentence
    assert caught.value.exit_code == 2


def test_refusal_of_torch_export_names_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("data-dependent branch\nand a long trace")

    monkeypatch.setattr("irc.model.capture.export", refuse)
    with pytest.raises(InputError) as caught:
        capture(LlamaConfig(**SMALL), torch.float32)
    for part in ("llama", "data-dependent branch", "config.json"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_weights_that_need_a_scale_are_refused(dtype: torch.dtype) -> None:
    """Name and shape are right, but the numbers mean nothing without the scale."""
    captured = capture(LlamaConfig(**SMALL), torch.float32)
    weights = _random(captured.graph, tied=False)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(dtype)
    with pytest.raises(InputError, match=rf"up_proj\.weight .*{str(dtype)[6:]}"):
        assign_weights(captured, weights)


def test_shards_give_every_weight_and_hold_one_shard(tmp_path: Path) -> None:
    """Weights equal those in the files in any order of reading, and only the current shard stays mapped."""
    shards = {"a": {"x": torch.arange(3.0), "y": torch.ones(2)}, "b": {"z": torch.full((4,), 7.0)}}
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    index = {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights = BaseModel("two shards", tmp_path).weights()
    assert set(weights) == {"x", "y", "z"}
    expected = {key: tensor for tensors in shards.values() for key, tensor in tensors.items()}
    for key in ("x", "z", "y", "z"):
        torch.testing.assert_close(weights[key], expected[key], rtol=0, atol=0)
    held = weakref.ref(weights["x"])
    assert held() is not None
    assert weights["z"].sum() == 28
    assert held() is None


def test_what_decides_the_result_makes_the_identity(model_folder: Path, tmp_path: Path) -> None:
    """Weights alone do not: stages that another configuration trained must not be taken for this one's."""
    plain = find_base(str(model_folder))
    for name, change, same in (
        ("moved", {"_name_or_path": "elsewhere", "transformers_version": "9.9"}, True),
        ("norm", {"rms_norm_eps": 0.1}, False),
        ("activation", {"hidden_act": "gelu"}, False),
    ):
        folder = Path(shutil.copytree(model_folder, tmp_path / name))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        assert find_base(str(folder)).sha256() == plain.sha256()
        assert (find_base(str(folder)).identity() == plain.identity()) == same
    folder = Path(shutil.copytree(model_folder, tmp_path / "tokenizer"))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert find_base(str(folder)).identity() != plain.identity()
