"""config.json: options that change the form of the output, and values that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from irc.errors import InputError
from irc.model.build import build_plain
from irc.model.checkpoint import find_base


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FLAGS: list[dict[str, Any]] = [
    {"output_hidden_states": True},
    {"output_hidden_states": True, "output_attentions": True, "return_dict": False},
    {"return_dict": False},
    {"use_cache": False},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_options_of_the_output_change_no_value(model_folder: Path, copied: Path, flags: dict[str, Any]) -> None:
    edit(copied, **flags)
    ids = torch.arange(6)[None]
    expected = LlamaForCausalLM.from_pretrained(model_folder).eval()
    model = build_plain(find_base(str(copied)))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
        new = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert new.tolist() == expected.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    assert find_base(str(copied)).identity() == find_base(str(model_folder)).identity()


IMPOSSIBLE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "padding": ({"pad_token_id": 257}, ("pad_token_id 257", "0 to 256")),
    "an int for a float": ({"rms_norm_eps": 1}, ("rms_norm_eps", "float", "value: 1")),
    "text for an int": ({"vocab_size": "257"}, ("vocab_size", "int", "'257'")),
    "text for layers": ({"num_hidden_layers": "2"}, ("num_hidden_layers", "int", "'2'")),
    "null": ({"max_position_embeddings": None}, ("max_position_embeddings", "int", "None")),
    "heads": ({"num_attention_heads": 3}, ("hidden size (32)", "(3)")),
    "heads in groups": ({"num_key_value_heads": 3}, ("num_key_value_heads 3", "num_attention_heads 4")),
    "no heads": ({"num_attention_heads": 0}, ("num_attention_heads is 0",)),
    "no positions": ({"max_position_embeddings": 0}, ("max_position_embeddings is 0",)),
    "activation": ({"hidden_act": "siluu"}, ("hidden_act", "siluu")),
    "text for a base": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}},
        ("rope_theta", "'10000'"),
    ),
    "base 0": ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, ("rope_theta", "is 0")),
    "text for an early base": ({"rope_parameters": None, "rope_theta": "1e4"}, ("rope_theta", "'1e4'")),
    "text for a factor": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "2"}},
        ("factor", "'2'"),
    ),
    "text for a bound": (
        {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": "low"},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
            }
        },
        ("low_freq_factor", "'low'"),
    ),
    "rope": ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2.0}}, ("'su'", "linear")),
    "unknown rope": ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, ("'ntk'", "linear")),
    "rope without factor": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ("'linear'", "factor")),
}


@pytest.mark.parametrize("which", IMPOSSIBLE)
def test_a_value_that_cannot_be_is_named(copied: Path, which: str) -> None:
    changes, parts = IMPOSSIBLE[which]
    edit(copied, **changes)
    with pytest.raises(InputError) as caught:
        build_plain(find_base(str(copied)))
    for part in parts:
        assert part in str(caught.value)
    for untrue in ("this architecture", "no causal language model", "convert a Llama", "\n"):
        assert untrue not in str(caught.value)


def test_a_configuration_is_an_object(copied: Path) -> None:
    (copied / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"object.*list"):
        _ = find_base(str(copied)).config


@pytest.mark.parametrize("end", ["256", [256, "b"], True])
def test_an_end_token_is_an_id(copied: Path, end: object) -> None:
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(InputError, match=r"generation_config\.json.*eos_token_id"):
        _ = find_base(str(copied)).generation


def test_padding_from_the_end_is_what_torch_allows(copied: Path) -> None:
    edit(copied, pad_token_id=-1)
    base = find_base(str(copied))
    base.check_sizes(base.weights())


def test_quantization_left_over_in_the_configuration(copied: Path) -> None:
    edit(copied, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(InputError, match=r"bitsandbytes.*float32.*remove quantization_config"):
        _ = find_base(str(copied)).config


def test_quantized_weights(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, copied / "model.safetensors")
    edit(copied, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(InputError, match=r"bitsandbytes.*quantized from"):
        _ = find_base(str(copied)).config


def test_weights_that_zero_3_left_empty(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    save_file({name: torch.empty(0) for name in weights}, copied / "model.safetensors")
    base = find_base(str(copied))
    with pytest.raises(InputError, match=r"\[0\].*ZeRO-3"):
        base.check_sizes(base.weights())
