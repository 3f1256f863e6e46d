"""The supported architectures: those that `tests/irc/test_architectures.py` converts, exports and verifies."""

from __future__ import annotations

from irc.errors import InputError

TESTED = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "ministral": "Ministral",
    "starcoder2": "StarCoder2",
    "stablelm": "StableLM",
    "arcee": "Arcee",
    "nemotron": "Nemotron",
    "seed_oss": "Seed-OSS",
    "exaone4": "EXAONE 4",
    "hyperclovax": "HyperCLOVA X",
    "phi3": "Phi-3",
    "granite": "Granite",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "gemma": "Gemma",
    "gemma3_text": "Gemma 3 (text)",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3-MoE",
    "olmoe": "OLMoE",
}
"""Maps the model type in config.json to the name that people know."""

*_FIRST, _LAST = TESTED.values()
SUPPORTED = f"a {', '.join(_FIRST)} or {_LAST} model"
"""All of them, for error messages."""


def check_model_type(model_type: str) -> None:
    """Refuse an architecture that is not tested: capture might succeed and compute something else.

    Raises:
        InputError: Names the architecture, and all that are supported.
    """
    if model_type not in TESTED:
        raise InputError(f"{model_type} is not a supported architecture; convert {SUPPORTED}")
