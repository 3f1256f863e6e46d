"""The embedded model: its shape, its size, and its measured perplexity on held-out text."""

from __future__ import annotations

import json

import pytest
import torch

from irc.evaluation.perplexity import evaluate
from irc.model.build import build_plain
from irc.model.checkpoint import find_base
from irc.text.source import load_text, pick, token_stream, windows


class Silent:
    def update(self, step: int, **figures: float | str) -> None:
        pass


def test_shape_and_size() -> None:
    base = find_base("demo")
    config = base.config
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 6
    assert config.hidden_size >= 256
    assert config.num_key_value_heads < config.num_attention_heads
    assert sum(shard.stat().st_size for shard in base.shards) <= 16 << 20
    assert all(tensor.dtype == torch.bfloat16 for tensor in base.weights().values())


def test_model_card_states_what_was_measured() -> None:
    folder = find_base("demo").folder
    facts = json.loads((folder / "training.json").read_text())
    card = (folder / "README.md").read_text()
    for figure in (f"{facts['steps']:,}", f"{facts['heldout_loss']:.3f}", f"{facts['heldout_perplexity']:.2f}"):
        assert figure in card


def test_it_has_learned() -> None:
    base = find_base("demo")
    text = token_stream(load_text("stdlib").split("heldout"), base.tokenizer)
    if text.numel() < 50_000:
        pytest.fail("the running Python ships too little source of its standard library for this test")
    model = build_plain(base)
    result = evaluate(model, pick(windows(text, 256), 24_576), Silent())
    assert result.dense < 25.0
