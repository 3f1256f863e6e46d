"""A model captured from its first layers computes what transformers' model of all layers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from irc.model import capture as captures
from irc.model.cache import cache_shape
from irc.model.capture import assign_weights, capture
from irc.model.repeated_layers import layers_to_copy, with_first_layers
from passes.match import match_units

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
PERIODIC = ["sliding_attention", "sliding_attention", "full_attention"]
CASES: dict[str, tuple[str, dict[str, Any], list[int] | None]] = {
    "llama": ("LlamaConfig", {"num_hidden_layers": 6, "tie_word_embeddings": True}, [0, 1, 1, 1, 1, 1]),
    "three layers": ("LlamaConfig", {"num_hidden_layers": 3}, None),
    "sliding": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 6, "head_dim": 8, "sliding_window": 4, "layer_types": 2 * PERIODIC},
        [0, 1, 2, 1, 1, 2],
    ),
    "no positions in some": (
        "SmolLM3Config",
        {"num_hidden_layers": 6, "no_rope_layers": [1, 1, 0, 1, 0, 1], "pad_token_id": 0},
        [0, 1, 2, 1, 2, 1],
    ),
    "experts in some": (
        "Qwen3MoeConfig",
        {
            "num_hidden_layers": 5,
            "head_dim": 8,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [0, 3],
        },
        None,  # the dense layer 3 has no dense layer before it but layer 0
    ),
    "experts after the first": (
        "Qwen3MoeConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [0],
        },
        [0, 1, 1, 1],
    ),
}


def make(name: str) -> Any:
    kind, options, _ = CASES[name]
    return getattr(transformers, kind)(**SHAPE | options)


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", CASES)
def test_each_layer_has_a_source_that_differs_in_weights_alone(name: str) -> None:
    assert layers_to_copy(on_meta(make(name))) == CASES[name][2]


def test_settings_of_single_layers_count() -> None:
    config = make("llama")
    config.num_hidden_layers = 8
    twin = on_meta(config)
    twin.model.layers[4].self_attn.scaling = 0.5
    assert layers_to_copy(twin) == [0, 1, 2, 3, 4, 1, 1, 1]


def test_lists_with_an_entry_per_layer_become_shorter() -> None:
    config = make("sliding")
    small = with_first_layers(config, 3)
    assert (small.num_hidden_layers, small.layer_types) == (3, PERIODIC)
    assert (config.num_hidden_layers, len(config.layer_types)) == (6, 6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2]])
def test_it_computes_what_the_model_computes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(name)
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    counts: list[int] = []
    traced = captures._traced

    def counted(config: Any, dtype: torch.dtype) -> Any:
        counts.append(config.num_hidden_layers)
        return traced(config, dtype)

    monkeypatch.setattr(captures, "_traced", counted)
    captured = capture(config, torch.float32)
    assert counts == [len(set(CASES[name][2] or []))]
    expected.save_pretrained(tmp_path)  # experts as checkpoints have them
    assign_weights(captured, load_file(tmp_path / "model.safetensors"))
    units = [unit.name for unit in match_units(captured.graph).units]
    assert len(units) == 2 * config.num_hidden_layers
    assert units == sorted(units, key=lambda unit: int(unit.split(".")[2]))

    layers, heads, size = cache_shape(config)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        full = expected(input_ids=ids, attention_mask=mask, position_ids=positions)
        empty = [torch.zeros(2, heads, 0, size) for _ in range(2 * layers)]
        logits, *present = captured.graph(ids, mask, positions, *empty)
        torch.testing.assert_close(logits[mask.bool()], full.logits[mask.bool()], rtol=0, atol=1e-5)
        for layer in range(layers):
            keys = full.past_key_values.layers[layer].keys  # fewer where the layer's window is shorter
            torch.testing.assert_close(present[2 * layer][:, :, -keys.shape[2] :], keys)
        first, *past = captured.graph(ids[:, :5], mask[:, :5], positions[:, :5], *empty)
        rest, *_ = captured.graph(ids[:, 5:], mask, positions[:, 5:], *past)
    torch.testing.assert_close(torch.cat((first, rest), 1)[mask.bool()], logits[mask.bool()], rtol=0, atol=1e-5)
