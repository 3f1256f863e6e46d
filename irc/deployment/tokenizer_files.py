"""The tokenizer of an exported folder: `tokenizer.json` as transformers applies it, and special tokens beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from irc.errors import InputError
from irc.files.untrusted import first_line
from irc.model.tokenizer import load_tokenizer
from irc.text.tokenizer import CONFIG, FILE, token_text

_TOKENIZER_FILES = (FILE, CONFIG, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def write_tokenizer(source: Path, name: str, folder: Path) -> None:
    """Write `tokenizer.json`, which the package tokenizers reads alone, and complete `tokenizer_config.json`.

    transformers changes a tokenizer when it loads it (added tokens, special tokens, prefix spaces), or makes it of
    other files; what it made is written. A folder without any tokenizer gets none.

    Args:
        source: Folder of the model; other files of its tokenizer are copied by the caller.
        name: What to call it in a failure.
        folder: Folder to write to; may be `source`.

    Raises:
        InputError: The tokenizer does not load, or cannot be written as `tokenizer.json`.
    """
    if not any((source / file).is_file() for file in _TOKENIZER_FILES):
        return
    tokenizer = load_tokenizer(source, name)
    (folder / FILE).write_text(_serialized(tokenizer, name), encoding="utf-8")
    path = folder / CONFIG
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = {key: text for key in ("eos_token", "bos_token") if (text := getattr(tokenizer, key, None)) is not None}
    changed = {key: str(text) for key, text in changed.items() if token_text(config.get(key)) != str(text)}
    cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    if config.get("clean_up_tokenization_spaces") is not cleans:
        changed["clean_up_tokenization_spaces"] = cleans
    if changed:
        path.write_text(json.dumps(config | changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _serialized(tokenizer: Any, name: str) -> str:
    """Return the content of `tokenizer.json`; a tokenizer written in Python is converted."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        try:
            backend = convert_slow_tokenizer(tokenizer)
        except Exception as error:
            kind = type(tokenizer).__name__
            raise InputError(
                f"{name}: its tokenizer ({kind}) cannot be written as {FILE} ({first_line(error)}); save the model "
                "with a tokenizer that has one"
            ) from error
    text: str = backend.to_str(pretty=True)
    return text
