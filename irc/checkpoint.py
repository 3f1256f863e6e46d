"""The base model on disk: configuration, tokenizer, safetensors shards and their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from irc.errors import InputError

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LARGE_MODEL_BYTES = 2_000_000_000
_PIECE = 1 << 22


@dataclass(frozen=True)
class BaseModel:
    """A causal language model in a local folder.

    Attributes:
        name: What the user asked for.
        folder: Where its files are.
    """

    name: str
    folder: Path

    @cached_property
    def config(self) -> PretrainedConfig:
        """Configuration; code that a folder may hold is never run."""
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.name}: config.json cannot be used ({_sentence(error)})") from error
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the folder."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.name}: the folder holds no usable tokenizer ({_sentence(error)})") from error
        tokenizer.model_max_length = int(1e30)  # windows are cut by us; no warning about long texts
        return tokenizer

    @property
    def shards(self) -> list[Path]:
        """The safetensors files, in order.

        Raises:
            InputError: There are none, or the index names one that is not there.
        """
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(f"{index}: not a safetensors index") from error
            shards = [self.folder / Path(name).name for name in names]
        else:
            shards = [self.folder / "model.safetensors"]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            pickles = any(self.folder.glob("*.bin"))
            why = (
                "only pickled .bin weights, which are never loaded: save it with safe_serialization"
                if pickles
                else "no weights"
            )
            raise InputError(f"{self.name}: {missing[0]} is missing; the folder holds {why}")
        return shards

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Return all weights, memory-mapped: pages are read when they are touched."""
        return _Shards(self.shards)

    def check_finite(self) -> None:
        """Refuse weights with NaN or infinity, naming the first; no shard stays in memory."""
        for shard in self.shards:
            for key, tensor in _mapped(shard).items():
                # In pieces: what isfinite allocates for a large embedding would be the peak of a conversion.
                pieces = tensor.flatten().split(_PIECE) if tensor.is_floating_point() else ()
                if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
                    raise InputError(
                        f"{self.name}: weight {key} holds NaN or infinite values; the checkpoint is damaged"
                    )

    def sha256(self) -> str:
        """Return the SHA-256 over all shards in order."""
        digest = hashlib.sha256()
        for shard in self.shards:
            with shard.open("rb") as opened:
                while block := opened.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def identity(self) -> str:
        """Return a SHA-256 of all that decides what the model computes: weights, configuration and tokenizer.

        Names, paths and versions of libraries in the configuration do not count.
        """
        ignored = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
        config = {key: value for key, value in self.config.to_dict().items() if key not in ignored}
        digest = hashlib.sha256((self.sha256() + json.dumps(config, sort_keys=True, default=str)).encode())
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"):
            if (self.folder / name).is_file():
                digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()

    def dtype(self, wanted: str) -> torch.dtype:
        """Resolve a `--dtype`: `auto` is fp32, but bf16 for checkpoints over 2 GB."""
        if wanted != "auto":
            if wanted not in DTYPES:
                raise InputError(f"dtype is '{wanted}'; choose from auto, {', '.join(DTYPES)}")
            return DTYPES[wanted]
        size = sum(shard.stat().st_size for shard in self.shards)
        return torch.bfloat16 if size > _LARGE_MODEL_BYTES else torch.float32


def find_base(name: str, revision: str | None = None) -> BaseModel:
    """Resolve MODEL: `demo`, a local folder, or a hub id (downloaded, safetensors only).

    Raises:
        InputError: Nothing is there under that name.
    """
    if name == "demo":
        return BaseModel(name, Path(str(resources.files("irc"))) / "demo")
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{name}: no config.json in this folder; give a Hugging Face model folder")
        return BaseModel(name, folder)
    if folder.exists() or name.startswith((".", "/")) or name.count("/") != 1:
        raise InputError(f"{name}: there is no such model folder; give a folder, a hub id such as org/name, or demo")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.txt"]
    try:
        path = snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:
        raise InputError(f"{name}: no such folder, and the hub did not give it ({_sentence(error)})") from error
    return BaseModel(name, Path(path))


class _Shards(Mapping[str, torch.Tensor]):
    """Weights by name. Only one shard is held: what a reader converts or copies leaves memory with its shard."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shard = {key: shard for shard in shards for key in _mapped(shard)}
        self._current: tuple[Path | None, dict[str, torch.Tensor]] = (None, {})

    def __getitem__(self, name: str) -> torch.Tensor:
        shard = self._shard[name]
        if self._current[0] != shard:
            self._current = (None, {})
            self._current = (shard, _mapped(shard))
        return self._current[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard)

    def __len__(self) -> int:
        return len(self._shard)


def _mapped(shard: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(shard, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"{shard}: truncated or not a safetensors file ({_sentence(error)})") from error


def _sentence(error: BaseException) -> str:
    text: Any = str(error).strip() or type(error).__name__
    return str(text).splitlines()[0][:200]
