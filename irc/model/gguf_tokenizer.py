"""The tokenizer of a GGUF file, from the metadata that llama.cpp writes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from irc.errors import InputError

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    _LLAMA3: ("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe", "pixtral"),
    _QWEN2: ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"),
    _TEKKEN: ("tekken",),
    "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "": ("gpt-2", "phi-2", "mpt", "olmo", "exaone4", "trillion", "default"),
}
"""Maps how text is cut into words before the merges to the names that llama.cpp has for it (`tokenizer.ggml.pre`)."""

_WHOLE_WORDS = frozenset(["llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"])
"""Names whose vocabularies hold words that the merges do not reach, and whose models expect a first token bos."""


def gguf_tokenizer(path: Path, values: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file.

    Byte-level vocabularies are built here: what transformers makes of them differs between its versions, in the words
    that they are cut into and in the special tokens. It converts the others.

    Args:
        path: The file.
        values: Its metadata by key.

    Raises:
        InputError: The file holds no tokenizer, or one of a kind that is not known.
    """
    tokens, kind = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.model")
    if not tokens:
        raise InputError(f"{path}: holds no tokenizer; use a file with one, or convert the Hugging Face checkpoint")
    cut = values.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        backend = _byte_level(path, values, cut)
    elif kind == "llama":
        backend = _converted(path)
    else:
        raise InputError(f"{path}: its tokenizer is of kind '{kind}', but only gpt2 and llama are supported")
    special = {name: tokens[index] for name, key in _SPECIAL.items() if (index := token_id(values, key)) is not None}
    first = values.get("tokenizer.ggml.add_bos_token", kind == "llama" or cut in _WHOLE_WORDS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=first and "bos_token" in special,
        add_eos_token=values.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in special,
        chat_template=values.get("tokenizer.chat_template"),
        **special,
    )


def token_id(values: Mapping[str, Any], key: str) -> int | None:
    """Return the id of a special token such as `eos`, None if the file has none.

    Args:
        values: Metadata of the file.
        key: What llama.cpp calls the token.
    """
    index = values.get(f"tokenizer.ggml.{key}_token_id")
    return index if index is not None and index < len(values["tokenizer.ggml.tokens"]) else None


def _byte_level(path: Path, values: Mapping[str, Any], cut: str) -> Tokenizer:
    words = next((how for how, names in _SPLITS.items() if cut in names), None)
    if words is None:
        raise InputError(
            f"{path}: its tokenizer cuts text in the way '{cut}', which is not supported; convert the Hugging Face "
            "checkpoint"
        )
    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in values["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut in _WHOLE_WORDS))
    if words == "digits":
        cutters = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif words:
        by_words = pre_tokenizers.Split(Regex(words), behavior="isolated")
        cutters = [by_words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        cutters = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cutters)
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, values.get("tokenizer.ggml.token_type", ()), strict=False):
        if kind == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    return backend


def _converted(path: Path) -> Tokenizer:
    """Return the tokenizer that transformers makes of the file."""
    with tempfile.TemporaryDirectory() as alone:  # transformers would read other files beside the GGUF
        (Path(alone) / "model.gguf").symlink_to(path.resolve())
        made = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", local_files_only=True)
    backend: Tokenizer = made.backend_tokenizer
    return backend
