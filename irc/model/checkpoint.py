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
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from irc.dtypes import LONG_NAMES, torch_dtype
from irc.errors import InputError
from irc.files.untrusted import check_links, check_pulled, first_line, read_json, read_text
from irc.model.architectures import check_model_type
from irc.model.gguf import gguf_in, open_gguf
from irc.model.paging import MappedPages
from irc.model.tokenizer import load_tokenizer
from irc.model.weight_files import INDEX, weight_files, what_instead

_COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""The files that decide which ids a text has."""

_FILES_OF_VERSION_0_1 = TOKENIZER_FILES[:5]
# Options for the form of a model's output, which leave its values alone. Capture expects logits and a cache.
_OUTPUT = {
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
    "return_dict": True,
    "use_cache": True,
}
_NOT_QUANTIZED = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_OURS = {"irc_config.json": "a bundle", "irc.json": "an ONNX folder"}
_ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_MOST_LAYERS = 10_000
_LARGE_MODEL_BYTES = 2_000_000_000
_PIECE = 1 << 22
# Beside safetensors: configuration, tokenizer, and chat templates, also those in additional_chat_templates/.
_DOWNLOADED = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.model", "*.jinja"]
_NOT_DOWNLOADED = ["consolidated*.safetensors", "*/*.safetensors"]  # the same weights once more, or another model's


@dataclass(frozen=True)
class BaseModel:
    """A causal language model in a local folder.

    Attributes:
        name: What the user called it.
        folder: Folder with its files.
        file_sha256: SHA-256 of the GGUF file that the folder was written from, if it was.
    """

    name: str
    folder: Path
    file_sha256: str | None = None

    @cached_property
    def config(self) -> PretrainedConfig:
        """Configuration, without options that change the form of the output. Code in the folder is never run.

        Raises:
            InputError: It cannot be read, or the architecture or kind of weights is not supported.
        """
        try:
            raw = json.loads(read_text(self.folder / "config.json"))
            if not isinstance(raw, dict):
                raise ValueError(f"expected an object of keys and values, found {type(raw).__name__}")
            _refuse_numbers(raw)
            for key, names in (
                ("configuration_files", "other configuration files"),
                ("transformers_weights", "weights"),
            ):
                if raw.get(key):
                    raise ValueError(f"it names {names} in {key}, which is not supported; remove the key")
            # transformers builds a list with one entry per layer before the number can be checked
            if raw.get("model_type") in CONFIG_MAPPING:
                check_model_type(raw["model_type"])
            layers = raw.get("num_hidden_layers")
            if isinstance(layers, int) and layers > _MOST_LAYERS:
                raise ValueError(f"num_hidden_layers is {str(layers)[:40]}, more than any model has")
            config: PretrainedConfig = AutoConfig.from_pretrained(
                self.folder, trust_remote_code=False, local_files_only=True
            )
            check_model_type(config.model_type)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error
        except Exception as error:
            reason = first_line(error, 500)
            raise InputError(f"{self.name}: config.json cannot be used ({reason}); correct it") from error
        self._refuse_quantized(config)
        for option, value in _OUTPUT.items():
            if hasattr(config, option):
                setattr(config, option, value)
        return config

    def _refuse_quantized(self, config: PretrainedConfig) -> None:
        """Refuse quantized weights, which need scales."""
        settings = getattr(config, "quantization_config", None)
        if settings is None:
            return
        method = settings.get("quant_method", "quantized") if isinstance(settings, dict) else "quantized"
        stored = self.weights().dtypes
        if stored <= _NOT_QUANTIZED:
            types = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in stored))
            raise InputError(
                f"{self.name}: config.json says that the weights are quantized ({str(method)[:40]}), but they are "
                f"stored as {types}; if that is right, remove quantization_config from config.json"
            )
        raise InputError(
            f"{self.name}: its weights are quantized ({str(method)[:40]}), which is not supported; convert the "
            "checkpoint that it was quantized from"
        )

    @cached_property
    def generation(self) -> GenerationConfig:
        """Defaults of text generation, as transformers reads them: generation_config.json, or else config.json.

        Raises:
            InputError: The file cannot be used.
        """
        path = self.folder / "generation_config.json"
        if not path.is_file():
            return GenerationConfig.from_model_config(self.config)
        try:
            found = GenerationConfig.from_dict(read_json(path))
            ends = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
            if any(end is not None and type(end) is not int for end in ends):
                raise ValueError(f"eos_token_id is {str(found.eos_token_id)[:80]!r}, expected an id or a list of ids")
            return found
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: cannot be used ({first_line(error)}); fix or delete it") from error

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the folder.

        Raises:
            InputError: The folder holds no usable tokenizer.
        """
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.folder, self.name)
        tokenizer.model_max_length = int(1e30)  # we cut windows ourselves, so no warning about long texts
        return tokenizer

    @cached_property
    def shards(self) -> list[Path]:
        """The safetensors files, in order.

        Raises:
            InputError: See `irc.model.weight_files.weight_files`.
        """
        return weight_files(self.folder, self.name)

    def weights(self) -> Weights:
        """Return all weights, memory-mapped: pages are read when they are used."""
        return Weights(self.shards)

    def check_sizes(self, weights: Weights) -> None:
        """Refuse a configuration that does not fit the weights, before anything is built from it.

        It may not have more layers or larger sizes than the weights, nor pad with a token that has no embedding.

        Args:
            weights: All weights of the checkpoint.

        Raises:
            InputError: Names the value and the largest that the weights allow.
        """
        empty = next((key for key, shape in weights.shapes.items() if 0 in shape), None)
        if empty is not None:
            raise InputError(
                f"{self.name}: weight {empty} is {list(weights.shapes[empty])}, without a number, as ZeRO-3 "
                "saves it; run zero_to_fp32.py, or save again with stage3_gather_16bit_weights_on_model_save"
            )
        largest = max((size for shape in weights.shapes.values() for size in shape), default=0)
        for name in (*_COUNTS, *_SIZES):
            value = getattr(self.config, name, None)
            most = len(weights) if name in _COUNTS else largest
            if value is not None and (type(value) is not int or not 0 < value <= most):
                raise InputError(
                    f"{self.name}: config.json says {name} {str(value)[:40]}, but the checkpoint's weights allow at "
                    f"most {most}"
                )
        heads, groups = (getattr(self.config, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
        if heads and groups and heads % groups:
            raise InputError(
                f"{self.name}: config.json says num_key_value_heads {groups}, which does not divide "
                f"num_attention_heads {heads}; correct the wrong one"
            )
        padding, tokens = getattr(self.config, "pad_token_id", None), self.config.vocab_size
        if padding is not None and not -tokens <= padding < tokens:
            raise InputError(
                f"{self.name}: config.json says pad_token_id {padding}, but the model has tokens 0 to {tokens - 1}; "
                "give one of them, or null"
            )

    def check_finite(self) -> None:
        """Refuse weights with NaN or infinity. No shard stays in memory.

        Raises:
            InputError: Names the first such weight.
        """
        for shard in self.shards:
            tensors = _mapped(shard)
            pages = MappedPages(tensors.values())
            for key, tensor in tensors.items():
                # In pieces, because isfinite of a whole embedding would set the memory peak of a conversion.
                real = tensor.is_floating_point() and tensor.itemsize > 1  # 8-bit weights are refused by assign_weights
                pieces = tensor.flatten().split(_PIECE) if real else ()
                if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
                    raise InputError(
                        f"{self.name}: weight {key} holds NaN or infinite values; the checkpoint is damaged"
                    )
                pages.release([tensor])

    def sha256(self) -> str:
        """Return the SHA-256 over all shards in order, computed by the first call, or that of the GGUF file."""
        return self.file_sha256 or self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for shard in self.shards:
            with shard.open("rb") as opened:
                while block := opened.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def identity(self) -> str:
        """Return a SHA-256 of everything that decides what the model computes: weights, configuration and tokenizer.

        Names, paths and library versions in the configuration do not count.
        """
        return self._identity(TOKENIZER_FILES)

    def has_identity(self, noted: Any) -> bool:
        """Return whether an identity that was noted earlier, perhaps by version 0.1, is this model's."""
        return noted in (self.identity(), self._identity(_FILES_OF_VERSION_0_1))

    def _identity(self, files: Sequence[str]) -> str:
        ignored = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
        config = {key: value for key, value in self.config.to_dict().items() if key not in ignored}
        digest = hashlib.sha256((self.sha256() + json.dumps(config, sort_keys=True, default=str)).encode())
        for name in files:
            if (self.folder / name).is_file():
                digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()

    def dtype(self, wanted: str) -> torch.dtype:
        """Return the data type for a name: `auto` is fp32, or bf16 for checkpoints over 2 GB.

        Raises:
            InputError: There is no such type.
        """
        if wanted != "auto":
            try:
                return torch_dtype(wanted)
            except KeyError:
                known = ", ".join(("auto", *LONG_NAMES, *LONG_NAMES.values()))
                raise InputError(f"dtype is '{wanted}'; choose from {known}", options=("dtype",)) from None
        size = sum(shard.stat().st_size for shard in self.shards)
        return torch.bfloat16 if size > _LARGE_MODEL_BYTES else torch.float32


def find_base(name: str, revision: str | None = None, *, ask_hub: bool = True) -> BaseModel:
    """Find a model: `demo`, a local folder, a GGUF file, or a hub id (downloaded, safetensors only).

    Args:
        name: Name or path of the model.
        revision: Revision of a hub id.
        ask_hub: Whether a hub id may be downloaded. False if a file names the model and not the user; then only the
            local cache is searched.

    Raises:
        InputError: There is no such model, or its folder holds a link that leads out of it.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise InputError(f"{name}: the path is not UTF-8, so that no file can name it; rename the folder")
    if name == "demo":
        return BaseModel(name, Path(str(resources.files("irc"))) / "demo")
    folder = Path(name)
    if name.strip() and _is_folder(folder):
        for ours, what in _OURS.items():
            if (folder / ours).is_file():
                raise InputError(f"{name}: is {what}, not a model; give the model that it was made from")
        if gguf := gguf_in(folder):
            return BaseModel(str(gguf), *open_gguf(gguf))
        return _checked(name, folder)
    if folder.suffix.lower() == ".gguf":
        return BaseModel(name, *open_gguf(folder))
    if not name.strip():
        raise InputError("the model's name is empty; give a folder, a hub id such as org/name, or demo")
    if len(name) > 200 or folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name[:200]}: no such model folder; give a folder, a hub id such as org/name, or demo")
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=_DOWNLOADED,
            ignore_patterns=_NOT_DOWNLOADED,
            local_files_only=not ask_hub,
        )
    except Exception as error:
        if not ask_hub:
            raise InputError(
                f"{name}: is neither a folder nor in the local cache, and a model that only a file names is not "
                "downloaded; name it yourself to download it",
                options=("base", "bundle"),
            ) from error
        raise InputError(f"{name}: no such folder, and the hub does not provide it ({first_line(error)})") from error
    return _checked(name, Path(path))


def _checked(name: str, folder: Path) -> BaseModel:
    if not (folder / "config.json").is_file():
        instead = what_instead(folder) or "give a Hugging Face model folder"
        raise InputError(f"{name}: no config.json in this folder; {instead}")
    check_links(folder)
    return BaseModel(name, folder)


def _refuse_numbers(raw: Mapping[str, Any]) -> None:
    """Refuse numbers of a config.json with which transformers would fail without naming them.

    Raises:
        ValueError: Names the key and the value.
    """
    for key in (*_SIZES, "max_position_embeddings"):
        if type(raw.get(key)) is int and raw[key] < 1:
            raise ValueError(f"{key} is {str(raw[key])[:40]}, expected 1 or more")
    kinds = [kind for kind in (raw.get("rope_parameters"), raw.get("rope_scaling")) if isinstance(kind, dict)]
    layers = [part for kind in kinds for part in kind.values() if isinstance(part, dict)]  # one for each kind of layer
    for part in ({"rope_theta": raw.get("rope_theta")}, *kinds, *layers):
        for key, value in part.items():
            if key in _ROPE_NUMBERS and value is not None and not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"{key} of the rope parameters is {value!r:.40}, expected a number above 0")


class Weights(Mapping[str, torch.Tensor]):
    """Weights by name. Only one shard is held at a time, so a converted or copied weight does not keep its shard.

    Attributes:
        shapes: Shapes of all weights.
        dtypes: All data types that occur.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shard: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: set[torch.dtype] = set()
        for shard in shards:
            for key, tensor in _mapped(shard).items():
                if key in self._shard and not (shard.parent / INDEX).is_file():
                    raise InputError(
                        f"{shard}: holds {key}, which {self._shard[key].name} holds too, and no {INDEX} is there; "
                        "delete the shard that belongs to another checkpoint"
                    )
                self._shard[key], self.shapes[key] = shard, tuple(tensor.shape)
                self.dtypes.add(tensor.dtype)
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
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        check_pulled(shard)
        raise InputError(f"{shard}: truncated or not a safetensors file ({first_line(error)})") from error


def _is_folder(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except (OSError, ValueError):  # not a possible file name
        return False
