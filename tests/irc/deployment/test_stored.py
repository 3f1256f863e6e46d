"""Exports in fp32 and in blocks read a 16-bit checkpoint weight by weight; their folder is that of weights in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from exporters.onnx_format import Quantization
from irc.bundle.loading import open_model
from irc.bundle.saving import save_bundle
from irc.bundle.source import ModelSource
from irc.deployment.onnx_folder import ExportOptions, export
from irc.model import stored
from irc.model.build import build_routed
from irc.model.checkpoint import find_base
from irc.model.routed import RoutingSpec
from tests.irc.conftest import byte_tokenizer

SIZES = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "fused linears": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, tie_word_embeddings=False)),
    "experts": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)),
}


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_LEAST", 1)


def saved(name: str, dtype: torch.dtype, folder: Path) -> Path:
    """Save a random model, whose numbers bf16 holds, in a type."""
    torch.manual_seed(0)
    MODELS[name]().bfloat16().to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "routed", "how"),
    [("tied", False, None), *((name, True, Quantization(4, 16)) for name in MODELS)],
    ids=["tied, fp32", *MODELS],
)
def test_the_folder_is_that_of_weights_in_fp32(
    name: str, routed: bool, how: Quantization | None, tmp_path: Path
) -> None:
    written = []
    for dtype in (torch.bfloat16, torch.float32):
        source, folder = saved(name, dtype, tmp_path / f"model-{dtype}"), tmp_path / f"onnx-{dtype}"
        if routed:
            model, source = build_routed(find_base(str(source)), RoutingSpec(4), "fp32"), tmp_path / f"bundle-{dtype}"
            save_bundle(model, source)
        export(ModelSource(str(source), dtype="fp32"), folder, ExportOptions(quantization=how))
        written.append((folder / "model.onnx.data").read_bytes())
    assert written[0] == written[1]


def test_placeholders_stand_for_16_bit_weights_and_compute_nothing(tmp_path: Path) -> None:
    base = saved("tied", torch.bfloat16, tmp_path / "model")
    model = open_model(ModelSource(str(base), dtype="fp32", as_stored=True))
    assert model.stored is not None
    assert len(model.stored.tensors) == 2 * 7 + 1
    assert model(torch.ones(1, 3, dtype=torch.int64)).logits.isnan().all()
    again = open_model(ModelSource(str(base), dtype="bf16", as_stored=True))
    assert again.stored is not None
    assert not again.stored.tensors
