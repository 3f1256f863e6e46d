"""Writes tiny models as GGUF files, in the way of llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

CONTROL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe", *CONTROL]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3 if token in CONTROL else 1 for token in TOKENS],
    "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he"],
    "tokenizer.ggml.bos_token_id": TOKENS.index("<|im_start|>"),
    "tokenizer.ggml.eos_token_id": TOKENS.index("<|im_end|>"),
    "tokenizer.ggml.padding_token_id": TOKENS.index("<|end|>"),
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": CHAT,
}
SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
}


def tiny_llama() -> LlamaConfig:
    """Return the configuration of a Llama with tied embeddings."""
    return LlamaConfig(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-5)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str = "llama",
    *,
    types: Sequence[str] = ("F32",),
    values: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write a model.

    Args:
        path: Where the file goes.
        model: A model of transformers.
        kind: What llama.cpp calls its architecture.
        types: Data types of the matrices, in turn.
        values: Metadata to add or to replace; None removes a key.
        tensors: Weights to add or to replace, fp32; None removes one.
    """
    writer = GGUFWriter(path, kind)
    for key, value in (_metadata(model.config, kind) | TOKENIZER | dict(values or {})).items():
        if value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    weights: dict[str, Any] = _weights(model, kind) | dict(tensors or {})
    for index, (name, weight) in enumerate(weights.items()):
        if weight is not None:
            of = GGMLQuantizationType[types[index % len(types)]] if weight.ndim > 1 else GGMLQuantizationType.F32
            if of == GGMLQuantizationType.F64:
                writer.add_tensor(name, weight.astype(np.float64))
            else:
                writer.add_tensor(name, quantize(weight, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(config: PretrainedConfig) -> np.ndarray:
    """Return what llama.cpp stores of Llama 3's scaling of positions: a factor for each frequency."""
    rope = config.rope_parameters
    context, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for index in range(0, config.head_dim, 2):
        length = 2 * np.pi * rope["rope_theta"] ** (index / config.head_dim)
        smooth = min(1.0, max(0.0, (context / length - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def _metadata(config: PretrainedConfig, kind: str) -> dict[str, Any]:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    values |= {"rope.dimension_count": head} if kind in ("llama", "phi3") else {}
    values |= {"attention.key_length": head} if kind in ("qwen3", "gemma3") else {}
    values |= {"attention.sliding_window": config.sliding_window} if kind in ("phi3", "gemma3") else {}
    return {f"{kind}.{key}": value for key, value in values.items()}


def _weights(model: PreTrainedModel, kind: str) -> dict[str, np.ndarray]:
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == kind)
    names, found = get_tensor_name_map(arch, model.config.num_hidden_layers), {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        weight = tensor.to(torch.float32).numpy()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        if kind == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(weight)
    return found
