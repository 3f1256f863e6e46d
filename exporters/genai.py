"""`genai_config.json`, which onnxruntime-genai reads beside a model."""

from __future__ import annotations

from typing import Any

from exporters.onnx_format import MODEL, CacheShape

_LONGEST = 2048  # tokens, prompt included, that a shared buffer has room for where a program says nothing


def genai_config(
    config: dict[str, Any], generation: dict[str, Any], cache: CacheShape, library: str | None = None
) -> dict[str, Any]:
    """Return the configuration of onnxruntime-genai.

    Args:
        config: The model's config.json.
        generation: Its generation_config.json.
        cache: Shape of the key/value cache.
        library: Name of the operator library beside the model, whose attention finds its tokens in a cache with room
            for more, so that past and present can share memory; None for portable operators.
    """

    def token(name: str) -> Any:
        value = generation.get(name)
        return config.get(name) if value is None else value

    end = token("eos_token_id")
    first_end = end[0] if isinstance(end, list) else end
    context = int(config.get("max_position_embeddings") or 2048)
    return {
        "model": {
            "type": config["model_type"],
            "vocab_size": config["vocab_size"],
            "context_length": context,
            "bos_token_id": token("bos_token_id") if token("bos_token_id") is not None else first_end,
            "eos_token_id": end,
            "pad_token_id": token("pad_token_id") if token("pad_token_id") is not None else first_end,
            "decoder": {
                "filename": MODEL,
                "head_size": cache.size,
                "hidden_size": config["hidden_size"],
                "num_attention_heads": config["num_attention_heads"],
                "num_hidden_layers": cache.layers,
                "num_key_value_heads": cache.heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "session_options": {"provider_options": [], **({"custom_ops_library": library} if library else {})},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(context, _LONGEST) if library else context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": library is not None,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
