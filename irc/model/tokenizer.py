"""Loads a tokenizer from a folder, and from nowhere else: no code of the folder runs and no hub is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from irc.errors import InputError
from irc.files.untrusted import check_plain, check_pulled, first_line, read_text

_CONFIG = "tokenizer_config.json"
_FILES = ("_file", "_spm", "sp_model")  # endings of keys that name files
_NEVER_READ = ("special_tokens_map_file",)  # often holds a path on its author's machine
# Keys that transformers follows out of the folder.
_REFUSED = ("gguf_file", "fast_tokenizer_files", "init_inputs", "vocab", "merges")
_READ = (_CONFIG, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "config.json")
_CHECKED = ("*.model", "chat_template.jinja", "additional_chat_templates/*.jinja")  # *.model is of SentencePiece


def load_tokenizer(folder: Path, name: str) -> Any:
    """Load a tokenizer.

    Args:
        folder: Folder with its files.
        name: What errors call the folder.

    Raises:
        InputError: The folder holds no usable tokenizer, or one that names files outside of the folder.
    """
    try:
        for file in _READ:
            if (folder / file).is_file():
                text = read_text(folder / file)
                if file == _CONFIG:
                    _check_files(json.loads(text), folder / file)
        for pattern in _CHECKED:
            for path in folder.glob(pattern):
                check_pulled(path)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except InputError:
        raise
    except BaseException as error:
        # A panic of the Rust library is not an Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{name}: the folder holds no usable tokenizer ({first_line(error)})") from error
        raise


def _check_files(config: Any, path: Path) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"{_CONFIG} does not hold keys and values")
    for key in _REFUSED:
        if config.get(key):
            raise InputError(f"{path}: holds {key}, which is not supported; remove it")
    never_read = (*_NEVER_READ, *(["tokenizer_file"] if path.with_name("tokenizer.json").is_file() else []))
    for key, value in config.items():
        if key.endswith(_FILES) and key not in never_read and value is not None:
            check_plain(value, path)
