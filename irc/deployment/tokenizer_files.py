"""The tokenizer of an exported folder: `tokenizer.json` as transformers applies it, and special tokens beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from irc.errors import InputError
from irc.files.strict_yaml import short_repr
from irc.files.untrusted import first_line
from irc.model.checkpoint import TOKENIZER_FILES
from irc.model.tokenizer import load_tokenizer
from irc.text.tokenizer import CONFIG, FILE, open_tokenizer, token_text

_TEXTS = (".json", ".jinja", ".model", ".txt")
_ANY_OF = (FILE, CONFIG, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_PROBE = " The café\u2019s 1,234 items\n\tcost  \u20ac5; 你好 \U0001f600"


def write_tokenizer(source: Path, name: str, folder: Path) -> None:
    """Copy a tokenizer, write `tokenizer.json` for the package tokenizers, and complete `tokenizer_config.json`.

    transformers changes a tokenizer when it loads it (added tokens, special tokens, prefix spaces), or makes it of
    other files; what it made is written. A folder without any tokenizer gets none.

    Args:
        source: Folder of the model.
        name: What to call it in a failure.
        folder: Folder to write to; may be `source`. Code and weights are never copied.

    Raises:
        InputError: The tokenizer does not load, cannot be written as `tokenizer.json`, or gives other ids once it is.
    """
    if not any((source / file).is_file() for file in _ANY_OF):
        return
    for path in source.iterdir() if source != folder else ():
        if path.is_file() and (path.name in TOKENIZER_FILES or _is_part(path)):
            shutil.copyfile(path, folder / path.name)
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
    _check_ids(tokenizer, name, folder)


def _is_part(path: Path) -> bool:
    return path.name.startswith("tokenizer") and path.suffix in _TEXTS


def _check_ids(tokenizer: Any, name: str, folder: Path) -> None:
    """Refuse a written tokenizer that gives other ids than the loaded one, read by our runtime or by transformers."""
    readers = {"irc": open_tokenizer(folder).encode, "transformers": load_tokenizer(folder, name).encode}
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    for probe in (_PROBE, *specials, _PROBE.join(("", *specials, ""))):
        wanted = tokenizer.encode(probe)
        for reader, encode in readers.items():
            if (found := encode(probe)) != wanted:
                raise InputError(
                    f"{name}: the exported tokenizer, read by {reader}, gives {short_repr(probe)} the ids "
                    f"{short_repr(found)}, but the model's gives {short_repr(wanted)}; save the model's tokenizer with "
                    "save_pretrained and export again"
                )


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
