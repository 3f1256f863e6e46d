"""The Llamas that are timed: by sizes, by a well-known name, or by a config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irc.errors import InputError
from irc.files.untrusted import read_json


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights.

    Attributes:
        hidden: Hidden size.
        layers: Decoder layers.
        ffn: Size inside the FFN.
        heads: Attention heads.
        kv_heads: Key/value heads.
        vocab: Vocabulary.
    """

    hidden: int = 1024
    layers: int = 8
    ffn: int = 2816
    heads: int = 16
    kv_heads: int = 16
    vocab: int = 4096

    def check(self) -> None:
        """Refuse sizes of which no Llama can be made.

        Raises:
            InputError: Names the sizes and what must hold.
        """
        if min(vars(self).values()) < 1:
            raise InputError(f"a shape needs sizes of at least 1, found {vars(self)}")
        if self.hidden % self.heads or self.heads % self.kv_heads or self.hidden // self.heads % 2:
            raise InputError(
                f"hidden {self.hidden}, heads {self.heads}, kv_heads {self.kv_heads}: heads must divide the hidden "
                "size into even parts, and kv_heads must divide heads"
            )

    def config(self, context: int) -> Any:
        """Return transformers' configuration.

        Args:
            context: Most tokens of a text.
        """
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.ffn,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=context,
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
        )


# Sizes of Meta's config.json files.
SHAPES = {
    "llama-3.2-1b": Shape(2048, 16, 8192, 32, 8, 128_256),
    "llama-3.2-3b": Shape(3072, 28, 8192, 24, 8, 128_256),
    "llama-3.1-8b": Shape(4096, 32, 14_336, 32, 8, 128_256),
}
_KEYS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}


def shape_named(name: str) -> Shape:
    """Return a shape by its name, or the sizes of a config.json or of the folder that holds one.

    Raises:
        InputError: There is no such name or file, or the file lacks a size.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    try:
        path = path / "config.json" if path.is_dir() else path
        found = read_json(path)
        sizes: dict[str, Any] = {field: found.get(key) for field, key in _KEYS.items()}
    except OSError as error:
        raise InputError(
            f"--shape is '{name}'; choose from {', '.join(SHAPES)}, or give a config.json ({error.strerror})"
        ) from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: this is no config.json of a model") from error
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    missing = [_KEYS[field] for field, value in sizes.items() if not isinstance(value, int) or isinstance(value, bool)]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} should be a whole number; give a Llama's config.json")
    return Shape(**sizes)
