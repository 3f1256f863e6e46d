"""The tokenizer of an ONNX folder, read from `tokenizer.json` by the package tokenizers alone.

Export writes that file from the tokenizer that transformers loads, so that both give the same ids and the same text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from irc.errors import InputError
from irc.files.untrusted import first_line, read_text

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
_MAP = "special_tokens_map.json"  # holds special tokens in folders of early versions
_READ_BY_OTHERS = ("config.json", "added_tokens.json")  # a damaged one is refused here too
_CLEANED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""Replacements that transformers makes, in this order, for tokenizers that join words with spaces."""


class TextTokenizer:
    """Ids from text, and text from ids.

    Args:
        tokenizer: The tokenizer itself; its truncation and padding are turned off.
        config: The keys of `tokenizer_config.json`, of which the special tokens and the clean-up of spaces are used.

    Attributes:
        eos_token_id: Id of the token that ends a text, None if there is none.
        bos_token_id: Id of the token that begins a text, None if there is none.
    """

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
        self.eos_token_id = self._id(config.get("eos_token"))
        self.bos_token_id = self._id(config.get("bos_token"))
        # It harms BPE, and transformers skips it there unless the second key insists.
        insists = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output") is True
        wanted = config.get("clean_up_tokenization_spaces") is True
        self._cleans = wanted and (insists or not isinstance(tokenizer.model, BPE))

    def _id(self, token: Any) -> int | None:
        text = token_text(token)
        found: int | None = None if text is None else self._tokenizer.token_to_id(text)
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text.

        Args:
            text: Valid Unicode, without lone surrogates.
            add_special_tokens: Whether to add the tokens that begin or end every text of this tokenizer.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids; half a character becomes U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if self._cleans:
            for found, wanted in _CLEANED:
                text = text.replace(found, wanted)
        return text


def open_tokenizer(folder: Path) -> TextTokenizer:
    """Open the tokenizer of an ONNX folder; only files beside each other are read.

    Args:
        folder: Folder with `tokenizer.json`, and `tokenizer_config.json` where there are special tokens.

    Raises:
        InputError: There is no tokenizer, or it is damaged.
    """
    try:
        for name in _READ_BY_OTHERS:
            _read(folder / name)
        config = {**_read(folder / _MAP), **_read(folder / CONFIG)}
        return TextTokenizer(Tokenizer.from_str(read_text(folder / FILE)), config)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{folder}: the folder holds no usable tokenizer ({FILE} is missing); export again") from error
    except BaseException as error:
        # A panic of the Rust library is not an Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{folder}: the folder holds no usable tokenizer ({first_line(error)})") from error
        raise


def token_text(token: Any) -> str | None:
    """Return the text of a special token as configurations have it: text, or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is not an object of keys and values")
    return found
