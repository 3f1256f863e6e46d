"""Tiny models, eager and captured. Each is captured once per session and copied for every test."""

from __future__ import annotations

import copy
import gc
import json
import logging as loggers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.export import export, unflatten
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    logging,
)

from irc.model import build
from irc.model.cache import cache_shape
from irc.model.capture import Captured, _relink, _root, assign_weights, capture
from passes.tracing import tracing

logging.set_verbosity_error()
# pytest captures loggers that do not propagate, and PyTorch logs every symbol and guard of a capture to this one.
_trace = loggers.getLogger("torch.__trace")
_trace.handlers.clear()
_trace.propagate = True
torch.set_num_threads(1)  # with tiny models, threads only wait for each other
gc.set_threshold(50_000, 20, 50)  # otherwise garbage collection takes a tenth of the time

# initializer_range is ten times the usual one, so that a tiny model is not nearly linear.
_SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "llama-mha-biased-rope3": lambda: LlamaConfig(
        **_SHAPE | {"num_hidden_layers": 1, "num_key_value_heads": 4},
        attention_bias=True,
        mlp_bias=True,
        rope_scaling=_LLAMA3_ROPE,
    ),
    "llama-3-layers": lambda: LlamaConfig(**_SHAPE | {"num_hidden_layers": 3, "num_key_value_heads": 1}),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**_SHAPE | {"num_key_value_heads": 4}, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=16),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that all workers end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@dataclass
class Tiny:
    """A random tiny model in two forms: as transformers runs it, and captured with the same weights."""

    config: PretrainedConfig
    eager: PreTrainedModel
    captured: Captured

    @property
    def graph(self) -> fx.GraphModule:
        return self.captured.graph

    def no_past(self, batch: int) -> list[torch.Tensor]:
        layers, heads, size = cache_shape(self.config)
        return [torch.zeros(batch, heads, 0, size, dtype=self.captured.dtype) for _ in range(2 * layers)]

    def ids(self, batch: int, length: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.config.vocab_size, (batch, length), generator=generator)

    def run(self, ids: torch.Tensor, past: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Run the captured model without padding; return the logits and the new cache."""
        past = past or self.no_past(len(ids))
        before = past[0].shape[2]
        positions = torch.arange(before, before + ids.shape[1]).expand_as(ids)
        mask = torch.ones(len(ids), before + ids.shape[1], dtype=torch.int64)
        return list(self.graph(ids, mask, positions, *past))


def build_tiny(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Tiny:
    """Build a random model, with random biases and norms, and capture it."""
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.2
    captured = capture(config, dtype)
    assign_weights(captured, eager.state_dict())
    return Tiny(config, eager, captured)


@pytest.fixture(scope="session")
def _built() -> dict[tuple[str, torch.dtype], Tiny]:
    return {}


@pytest.fixture
def tiny(_built: dict[tuple[str, torch.dtype], Tiny]) -> Callable[..., Tiny]:
    """Give `tiny(name, dtype)`: a fresh copy of one of `CONFIGS`."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float32) -> Tiny:
        key = (name, dtype)
        if key not in _built:
            _built[key] = build_tiny(CONFIGS[name](), dtype)
        return copy.deepcopy(_built[key])

    return make


@pytest.fixture(scope="session")
def tiny_of() -> Callable[..., Tiny]:
    """Give `tiny_of(config, dtype)`: a tiny model of any configuration."""
    return build_tiny


@pytest.fixture(scope="session")
def captured_module() -> Callable[..., fx.GraphModule]:
    """Give `captured_module(module, *inputs)`: any module, captured as `irc.model.capture` does."""

    def make(module: nn.Module, *inputs: Any) -> fx.GraphModule:
        with tracing():
            unflattened = unflatten(export(module.eval(), inputs, strict=False))
        _relink(unflattened, module)
        return _root(unflattened)

    return make


@pytest.fixture(scope="session")
def copied_capture() -> Callable[[PretrainedConfig, torch.dtype], Captured]:
    """Give `copied_capture(config, dtype)`: like `irc.model.capture.capture`, but captures each architecture once."""
    known: dict[tuple[str, torch.dtype], Captured] = {}

    def copied(config: PretrainedConfig, dtype: torch.dtype) -> Captured:
        described = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        key = (json.dumps(described, sort_keys=True, default=str), dtype)
        if key not in known:
            known[key] = capture(config, dtype)
        copied = copy.deepcopy(known[key])
        copied.config.name_or_path = config.name_or_path
        return copied

    return copied


@pytest.fixture(scope="session", autouse=True)
def _quick_capture(copied_capture: Callable[..., Captured]) -> Iterator[None]:
    """Let commands in this process copy a capture instead of making it again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "capture", copied_capture)
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_registry() -> Iterator[None]:
    """Let torch.onnx read its translations once per session, because reading them for each export takes 0.8 seconds."""
    original, known = ONNXRegistry.from_torchlib, {}

    def from_torchlib(opset_version: int) -> ONNXRegistry:
        if opset_version not in known:
            known[opset_version] = original(opset_version)
        registry = copy.copy(known[opset_version])
        registry.functions = {target: list(found) for target, found in registry.functions.items()}  # ours are added
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
