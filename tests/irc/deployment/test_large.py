"""A model of over 2 GB, more than one protobuf message can hold: it exports, in little memory, and runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import irc
from irc.bundle.saving import save_bundle
from irc.cli import main
from irc.model.build import build_routed
from irc.model.checkpoint import find_base
from irc.model.routed import RoutingSpec
from irc.runtime.session import Runtime
from tests.irc.forked import Forked

PEAK_OVER_WEIGHTS = 1.6
CONFIG = {
    "vocab_size": 132_000,
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


def export_and_say_the_peak(*arguments: str) -> int:
    """Run the command line; then say this process's own peak: what its parent is told begins with the parent's."""
    code = main(arguments)
    status = Path("/proc/self/status")
    sys.stderr.write(status.read_text() if status.exists() else "")
    return code


def write_base(folder: Path, config: LlamaConfig) -> None:
    """Write weights that repeat 65,537 draws, no two rows alike: drawing 540 million would outlast the test."""
    draws = torch.randn(65_537, generator=torch.Generator().manual_seed(0)) * config.initializer_range
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    del wanted["lm_head.weight"]  # it is the embedding

    def weight(shape: torch.Size) -> torch.Tensor:
        count = shape.numel()
        return draws.repeat(-(-count // len(draws)))[:count].view(shape) if len(shape) > 1 else torch.ones(shape)

    weights = {name: weight(meta.shape) for name, meta in wanted.items()}
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def large(tmp_path: Path, model_folder: Path, shake: Callable[..., Any]) -> Path:
    """A bundle whose base is almost nothing but a tied embedding of 2.16 GB."""
    folder = tmp_path / "base"
    write_base(folder, LlamaConfig(**CONFIG))
    for file in model_folder.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    base = find_base(str(folder))
    model = build_routed(base, RoutingSpec(4), "fp32")
    save_bundle(shake(model), tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.slow
@torch.no_grad()
def test_a_model_of_over_two_gigabytes(large: Path, tmp_path: Path) -> None:
    output = tmp_path / "onnx"
    command = ["export", str(large), "-o", str(output), "--dtype", "fp32", "--json"]
    exporting = Forked(export_and_say_the_peak, *command, folder=tmp_path / "said")
    _, err = exporting.communicate(timeout=300)
    assert exporting.returncode == 0, err
    data = (output / "model.onnx.data").stat().st_size
    assert data > 2**31
    assert (output / "model.onnx").stat().st_size < 1e6
    peak = re.search(r"VmHWM:\s+(\d+) kB", err)
    if sys.platform == "linux":
        assert peak
        assert int(peak[1]) * 1024 <= PEAK_OVER_WEIGHTS * data
    onnx.checker.check_model(str(output / "model.onnx"))
    ids = torch.randint(0, CONFIG["vocab_size"], (1, 6), generator=torch.Generator().manual_seed(1))
    runtime = Runtime(output, "cpu")
    found = runtime.step(ids.numpy(), np.ones((1, 6), np.int64), runtime.empty_cache(1))
    expected = irc.load(large, dtype="fp32")(input_ids=ids).logits
    assert 0 < found.execute.mean() < 1
    np.testing.assert_allclose(found.logits, expected.numpy(), atol=1e-4)
