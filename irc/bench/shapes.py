"""Shapes of the random Llamas to time, given by sizes, by name, or by a config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irc.errors import InputError
from irc.files.untrusted import read_json


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama.

    Attributes:
        hidden: Hidden size.
        layers: Number of decoder layers.
        ffn: Inner size of the FFN.
        heads: Number of attention heads.
        kv_heads: Number of key/value heads.
        vocab: Size of the vocabulary.
    """

    hidden: int = 1024
    layers: int = 8
    ffn: int = 2816
    heads: int = 16
    kv_heads: int = 16
    vocab: int = 4096

    def check(self) -> None:
        """Refuse sizes that do not make a Llama.

        Raises:
            InputError: A size is below 1, or the sizes do not fit together.
        """
        if min(vars(self).values()) < 1:
            raise InputError(f"a size is less than 1 in {vars(self)}; give sizes of at least 1")
        if self.hidden % self.heads or self.heads % self.kv_heads or self.hidden // self.heads % 2:
            raise InputError(
                f"hidden {self.hidden}, heads {self.heads}, kv_heads {self.kv_heads} do not fit together; heads must "
                "divide hidden, the quotient must be even, and kv_heads must divide heads"
            )

    def config(self, context: int) -> Any:
        """Return the configuration for transformers.

        Args:
            context: Longest text, in tokens.
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


# The sizes in Meta's config.json files.
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
    """Return a shape by its name, or from a config.json or a folder that contains one.

    Raises:
        InputError: There is no such name or file, or a size is missing in the file.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    try:
        path = path / "config.json" if path.is_dir() else path
        config = read_json(path)
        sizes: dict[str, Any] = {field: config.get(key) for field, key in _KEYS.items()}
    except OSError as error:
        raise InputError(
            f"unknown shape '{name}' ({error.strerror}); choose from {', '.join(SHAPES)}, or give a config.json",
            options=("shape",),
        ) from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: not the config.json of a model; give the one of a Llama") from error
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    missing = [_KEYS[field] for field, value in sizes.items() if not isinstance(value, int) or isinstance(value, bool)]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} must be a whole number; give the config.json of a Llama")
    return Shape(**sizes)
