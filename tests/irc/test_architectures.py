"""Converts, exports and verifies every supported architecture; the others are refused by name.

Tiny random models of transformers' own classes. Windows of 16 tokens are longer than the sliding windows of 5. With
nothing skipped the routed model equals transformers' (fp32: 2e-5 where logits are around 5), and ONNX Runtime equals
PyTorch within what `irc verify` allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import irc
from irc.model.architectures import TESTED

SHAPE = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,  # cases whose layers differ have two
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # ten times the usual one: a tiny model must not be nearly linear
    "eos_token_id": 256,
    "bos_token_id": 256,
    "pad_token_id": 256,
}
QUICK = (
    "lff.tokens=512 lff.steps=1 lff.batch_size=4 router.steps=2 router.batch_size=4 router.calibration_tokens=1024 "
    "router.teach_steps=0 eval_tokens=128 yardstick_tokens=0 checkpoint_seconds=0 precision=fp32 sparsity=0.25"
).split()
VERIFY = "--tokens 128 --seq-len 16 --json".split()
HALF = (
    "stages=[lff,router,lora] lora.steps=2 lora.batch_size=4 lora.rank=2 kv_policy=reduced kv_threshold=0.1 dtype=bf16"
).split()
TWO = {"num_hidden_layers": 2}
SLIDING = {**TWO, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Case:
    """A configuration class of transformers and what differs from SHAPE."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        return getattr(transformers, self.config)(**SHAPE | self.options)


SUPPORTED = {
    "mistral-sliding": Case("MistralConfig", {"sliding_window": 5}),
    "qwen2-sliding": Case("Qwen2Config", {"use_sliding_window": True, **SLIDING}),
    "qwen3": Case("Qwen3Config", {"head_dim": 16}),
    "smollm3": Case("SmolLM3Config", {"no_rope_layers": [1, 0], **TWO}),
    "phi3-partial-rotary": Case("Phi3Config", {"partial_rotary_factor": 0.5}),
    "phi3": Case("Phi3Config", {"sliding_window": 5}),
    "granite": Case(
        "GraniteConfig", {"residual_multiplier": 0.5, "attention_multiplier": 0.2, "embedding_multiplier": 3.0}
    ),
    "olmo2": Case("Olmo2Config"),
    "olmo3": Case("Olmo3Config", SLIDING),
    "ministral": Case("MinistralConfig", {"head_dim": 8, **SLIDING}),
    "exaone4": Case("Exaone4Config", SLIDING),
    "starcoder2": Case("Starcoder2Config", {"sliding_window": 5, "residual_dropout": 0.1}),
    "stablelm": Case("StableLmConfig", {"use_qkv_bias": True}),
    "stablelm-parallel": Case("StableLmConfig", {"use_parallel_residual": True}),
    "nemotron": Case("NemotronConfig", {"head_dim": 8}),
    "arcee": Case("ArceeConfig"),
    "seed_oss": Case("SeedOssConfig", {"head_dim": 16, "residual_dropout": 0.1}),
    "hyperclovax": Case("HyperCLOVAXConfig", {"head_dim": 8, "residual_multiplier": 0.5, "use_post_norm": True}),
    "gemma": Case("GemmaConfig", {"head_dim": 8}),
    "gemma3": Case("Gemma3TextConfig", {"head_dim": 8, **SLIDING}),
    "olmoe": Case("OlmoeConfig", {"num_experts": 3, "num_experts_per_tok": 2}),
    "mixtral": Case("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
            **TWO,
        },
    ),
}
REFUSED = {
    "gpt2": Case("GPT2Config", {"num_key_value_heads": 4}),
    "cohere": Case("CohereConfig"),
    "mamba": Case("MambaConfig"),
    "falcon": Case("FalconConfig"),
    "qwen2_moe": Case(
        "Qwen2MoeConfig", {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    ),
}


@pytest.fixture
def save(tmp_path: Path, model_folder: Path) -> Callable[[Case], Path]:
    """Give `save(case)`: the folder of a random model with the byte tokenizer; norms and biases are random too."""

    def make(case: Case) -> Path:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(case.make())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += torch.randn_like(parameter) * 0.2
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        for path in model_folder.glob("*token*"):
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return make


def convert_arguments(folder: Path, output: Path, text_file: Path) -> list[str]:
    settings = [flag for setting in QUICK for flag in ("--set", setting)]
    named = ["convert", str(folder), "-o", str(output), "--data", str(text_file), "--rank", "4", "--seq-len", "16"]
    return [*named, "--device", "cpu", "--json", *settings]


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_convert_export_verify(
    name: str,
    save: Callable[[Case], Path],
    ids: torch.Tensor,
    text_file: Path,
    tmp_path: Path,
    irc_main: Callable[..., Any],
) -> None:
    folder, bundle, onnx = save(SUPPORTED[name]), tmp_path / "bundle", tmp_path / "onnx"
    converted = irc_main(*convert_arguments(folder, bundle, text_file))
    assert converted.code == 0, converted.err
    assert 0 < converted.json["sparsity"]["realized"] < 1

    routed = irc.load(bundle)
    assert [unit.kind for unit in routed.units] == ["attention", "ffn"] * routed.config.num_hidden_layers
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad(), routed.control.using(mode="execute"):
        torch.testing.assert_close(routed(ids).logits, expected(ids).logits, rtol=0, atol=2e-5)
        assert torch.equal(routed.get_input_embeddings()(ids), expected.get_input_embeddings()(ids))

    exported = irc_main("export", bundle, "-o", onnx, "--json")
    assert exported.code == 0, exported.err
    assert exported.json["routed_units"] == len(routed.units)
    verified = irc_main("verify", onnx, "--data", text_file, *VERIFY)
    assert verified.code == 0, verified.err
    assert verified.json["max_abs_diff"] <= 1e-4
    assert verified.json["routing_agreement"] > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("granite", "q_proj,v_proj"),  # a factor behind each unit
        ("mixtral", "q_proj,v_proj"),
        ("qwen3_moe", "q_proj,gate,up_proj"),  # of attention, of a choice of experts, of a layer without experts
    ],
)
def test_lora_reduced_keys_and_half_types(
    name: str, targets: str, save: Callable[[Case], Path], text_file: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    """Trained in bf16 with adapters, exported in fp16, keys and values of some units stored for executed tokens."""
    bundle, onnx = tmp_path / "bundle", tmp_path / "onnx"
    flags = [flag for setting in [*HALF, f"lora.targets=[{targets}]"] for flag in ("--set", setting)]
    converted = irc_main(*convert_arguments(save(SUPPORTED[name]), bundle, text_file), *flags)
    assert converted.code == 0, converted.err
    assert converted.json["kv"]["reduced_units"] > 0

    exported = irc_main("export", bundle, "-o", onnx, "--dtype", "fp16", "--json")
    assert exported.code == 0, exported.err
    verified = irc_main("verify", onnx, "--data", text_file, *VERIFY)
    assert verified.code == 0, verified.err


def test_linears_that_an_architecture_lacks_are_refused_for_lora(
    save: Callable[[Case], Path], text_file: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    settings = ["--stages", "lff,router,lora", "--set", "lora.targets=[gate_proj]"]
    refused = irc_main(*convert_arguments(save(SUPPORTED["mixtral"]), tmp_path / "bundle", text_file), *settings)
    assert refused.code == 2, refused.err
    assert "lora.targets" in refused.sentence()
    assert "'gate_proj'; choose from gate, k_proj, o_proj, q_proj, v_proj" in refused.sentence()
    assert not (tmp_path / "bundle.partial" / "lff.json").exists()  # before any stage


@pytest.mark.parametrize("verb", ["convert", "export", "eval", "inspect"])
@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(
    name: str, verb: str, save: Callable[[Case], Path], text_file: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    """Also those that can be captured: nobody has looked whether what they become is right."""
    folder = save(REFUSED[name])
    given: dict[str, list[str | Path]] = {
        "convert": list(convert_arguments(folder, tmp_path / "out", text_file)),
        "export": ["export", folder, "-o", tmp_path / "out"],
        "eval": ["eval", folder, "--data", text_file],
        "inspect": ["inspect", folder],
    }
    refused = irc_main(*given[verb])
    assert refused.code == 2, refused.err
    assert f"{name} is not a supported architecture; convert a Llama, Mistral" in refused.sentence()
    assert not (tmp_path / "out").exists()


def test_every_supported_architecture_is_in_the_matrix() -> None:
    assert {case.make().model_type for case in SUPPORTED.values()} | {"llama"} == set(TESTED)
