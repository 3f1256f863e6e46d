"""Opens GGUF files: writes what one holds as a Hugging Face folder, once, into a cache beside the hub's.

The weights are dequantized to fp32, or to bf16 if they would exceed 2 GB, one at a time. Names, permutations and the
meaning of the metadata are transformers' own.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from irc.errors import InputError
from irc.files.atomic import cannot_write, file_sha256, staged
from irc.files.untrusted import first_line
from irc.model.gguf_tokenizer import gguf_tokenizer, token_id

log = logging.getLogger(__name__)

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma3": "gemma3_text"}
"""Maps the architectures that are read to transformers' names for them."""

# What transformers' table leaves out and would then take from the defaults of its configurations.
_MORE_FIELDS = {
    "qwen3": {"attention.key_length": "head_dim"},
    "phi3": {"attention.sliding_window": "sliding_window"},
}
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_POINTER = b"version https://git-lfs"
_LARGE_MODEL_BYTES = 2_000_000_000
_PIECE = 1 << 22  # values dequantized at a time: the package's intermediates are several times as large
_REMEDY = "set HF_HOME to a folder with space that can be written to"


def gguf_in(folder: Path) -> Path | None:
    """Return the GGUF file of a folder without config.json, None if it holds none.

    Raises:
        InputError: It holds several.
    """
    found = sorted(folder.glob("*.gguf")) if not (folder / "config.json").is_file() else []
    if len(found) > 1:
        for path in found:
            _check_not_a_part(path)
        names = ", ".join(path.name for path in found[:5])
        raise InputError(f"{folder}: holds {len(found)} GGUF files ({names}); give the path of one")
    return found[0] if found else None


def open_gguf(path: Path) -> tuple[Path, str]:
    """Return a Hugging Face folder with a GGUF file's model, and the SHA-256 of the file.

    The first call for a file writes the folder.

    Raises:
        InputError: The file is not a whole GGUF file, holds a model that is not supported, or the package gguf is
            missing.
        IrcError: The disk is full.
    """
    _check_file(path)
    status = path.stat()
    sha256 = _hash(path.resolve(), status.st_size, status.st_mtime_ns)
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "irc" / "gguf" / sha256
    if not folder.is_dir():
        _write(_read(path), folder)
        log.info("%s: dequantized into %s", path, folder)
    return folder, sha256


@functools.cache
def _hash(path: Path, size: int, modified: int) -> str:
    return file_sha256(path)


def _check_file(path: Path) -> None:
    _check_not_a_part(path)
    try:
        with path.open("rb") as opened:
            start = opened.read(len(_POINTER))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if start == _POINTER:
        raise InputError(f"{path}: is a Git LFS pointer, not the file itself; fetch it with git lfs pull")
    if not start.startswith(b"GGUF"):
        raise InputError(f"{path}: not a GGUF file")


def _check_not_a_part(path: Path) -> None:
    if _PART.search(path.name):
        raise InputError(
            f"{path}: is one part of a split model; join the parts with llama-gguf-split --merge and give the result"
        )


@dataclass(frozen=True)
class _Weight:
    """A weight of the model, still as the file holds it."""

    name: str
    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self.tensor.shape))

    def values(self) -> Any:
        """Return the values as llama.cpp orders them, float32."""
        from gguf import dequantize

        values = np.empty(self.shape, np.float32)
        rows = max(1, _PIECE // values[0].size)
        for start in range(0, len(values), rows):
            part = slice(start, start + rows)
            values[part] = dequantize(self.tensor.data[part], self.tensor.tensor_type)
        return values


@dataclass(frozen=True)
class _Contents:
    """Everything that a GGUF file holds, as Hugging Face knows it, and what puts its weights into order."""

    config: PretrainedConfig
    generation: GenerationConfig
    tokenizer: PreTrainedTokenizerFast
    weights: list[_Weight]
    processor: TensorProcessor

    def values(self, weight: _Weight) -> torch.Tensor:
        """Return a weight as transformers orders it, in the data type to store."""
        processed = self.processor.process(weights=weight.values(), name=weight.tensor.name)
        return torch.from_numpy(processed.weights).to(self.config.dtype).contiguous()


def _read(path: Path) -> _Contents:
    """Read all but the weights, and check that every weight is there."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError(
            f"{path}: needs the package 'gguf'; install it with: pip install 'informed-routing-compiler[gguf]'"
        ) from error
    try:
        reader = GGUFReader(path)
        values, tensors = _metadata(reader), {tensor.name: tensor for tensor in reader.tensors}
        tokenizer = gguf_tokenizer(path, values)
        config = _config(path, values, tensors)
        processor, weights = _weights(path, values["general.architecture"], config, tensors)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: truncated, damaged or of an unknown form ({first_line(error)})") from error
    ends = [index for key in ("eos", "eot") if (index := token_id(values, key)) is not None]
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=list(dict.fromkeys(ends)) or None,
        pad_token_id=config.pad_token_id,
    )
    return _Contents(config, generation, tokenizer, weights, processor)


def _metadata(reader: Any) -> dict[str, Any]:
    """Return the metadata of a file by key, in the types of Python."""
    from gguf import GGUFValueType

    values = {}
    for key, field in reader.fields.items():
        parts = [field.parts[index] for index in field.data]
        is_text = field.types[-1] == GGUFValueType.STRING
        found = [bytes(part).decode() if is_text else part[0].item() for part in parts]
        values[key] = found if field.types[0] == GGUFValueType.ARRAY else found[0]
    return values


def _config(path: Path, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> PretrainedConfig:
    kind = values["general.architecture"]
    if kind not in _MODEL_TYPES:
        known = ", ".join(_MODEL_TYPES)
        raise InputError(
            f"{path}: holds a model of architecture '{kind}', but only {known} are read from GGUF files; convert the "
            "Hugging Face checkpoint"
        )
    table: Any = GGUF_CONFIG_MAPPING
    names = table[kind] | _MORE_FIELDS.get(kind, {})
    found = {name: values[f"{kind}.{key}"] for key, name in names.items() if name and f"{kind}.{key}" in values}
    if found["num_hidden_layers"] > len(tensors):
        raise ValueError(f"{found['num_hidden_layers']} layers, but {len(tensors)} weights")
    special = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found |= {name: token_id(values, key) for name, key in special.items()}
    found["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    found["tie_word_embeddings"] = "output.weight" not in tensors
    if found.get("sliding_window") == 0:
        found["sliding_window"] = None
    size = 4 * sum(prod(tensor.shape.tolist()) for tensor in tensors.values())
    config = CONFIG_MAPPING[_MODEL_TYPES[kind]](**found)
    config.dtype = torch.bfloat16 if size > _LARGE_MODEL_BYTES else torch.float32
    config.name_or_path = path.stem
    _set_positions(path, config, values, tensors)
    return config


def _set_positions(path: Path, config: PretrainedConfig, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Set how positions are scaled; refuse what the configuration would not say.

    A Llama 3 model stores a factor for each frequency and not the four numbers that these come from.
    """
    kind = values["general.architecture"]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = values.get(f"{kind}.attention.key_length", head)
    rotated = values.get(f"{kind}.rope.dimension_count", head)
    scaling = values.get(f"{kind}.rope.scaling.type", "none")
    if rotated != head or scaling != "none":
        what = f"rotates {rotated} of {head} values of a head" if rotated != head else f"scales positions ({scaling})"
        raise InputError(f"{path}: {what}, which is not read from GGUF files; convert the Hugging Face checkpoint")
    if _ROPE_FACTORS not in tensors:
        return
    factors = torch.from_numpy(_Weight("", tensors[_ROPE_FACTORS]).values())
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters |= _LLAMA3_ROPE | {"factor": factors.max().item()}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    unscaled = 1 / theta ** (torch.arange(0, head, 2) / head)
    if not torch.allclose(unscaled / scaled, factors, rtol=1e-3):
        raise InputError(f"{path}: {_ROPE_FACTORS} is not as in a Llama 3 model; convert the Hugging Face checkpoint")


def _weights(
    path: Path, kind: str, config: PretrainedConfig, tensors: Mapping[str, Any]
) -> tuple[TensorProcessor, list[_Weight]]:
    """Name all weights as transformers does, and refuse a file that does not fill the model exactly."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    processors: Any = TENSOR_PROCESSORS
    processor = processors.get(kind, TensorProcessor)(config=config.to_dict())
    weights_of = model.state_dict()
    # Without its submodules: transformers would also look for the weights of each of them alone, for seconds per layer.
    flat: Any = SimpleNamespace(config=config, state_dict=lambda: weights_of, named_children=tuple)
    names = get_gguf_hf_weights_map(flat, processor)
    shapes = {name: tuple(weight.shape) for name, weight in weights_of.items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    weights = [_Weight(names.get(name, ""), tensor) for name, tensor in tensors.items() if name != _ROPE_FACTORS]
    for weight in weights:
        expected = shapes.pop(weight.name, None)
        if expected is None:
            raise InputError(f"{path}: holds the weight {weight.tensor.name}, which is not part of a {kind} model")
        if weight.shape != expected:
            raise InputError(
                f"{path}: {weight.tensor.name} is {list(weight.shape)}, but its metadata say {list(expected)}"
            )
    if shapes:
        raise InputError(f"{path}: lacks {len(shapes)} weights, such as {next(iter(shapes))}")
    _check_types(path, weights)
    return processor, weights


def _check_types(path: Path, weights: list[_Weight]) -> None:
    from gguf import dequantize

    for kind, weight in {weight.tensor.tensor_type: weight for weight in weights}.items():
        try:
            dequantize(weight.tensor.data[:1], kind)
        except NotImplementedError as error:
            raise InputError(
                f"{path}: weights of type {kind.name} cannot be dequantized; use a file of another type, such as Q8_0"
            ) from error


def _write(contents: _Contents, folder: Path) -> None:
    """Write a Hugging Face folder, whole or not at all. Of several processes, the first one writes."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if folder.is_dir():
                return
            with staged(folder, _REMEDY) as staging:
                contents.config.save_pretrained(staging)
                contents.generation.save_pretrained(staging)
                contents.tokenizer.save_pretrained(staging)
                with (staging / "model.safetensors").open("wb") as opened:
                    _write_weights(opened, contents)
    except OSError as error:
        raise cannot_write(folder, error, _REMEDY) from error


def _write_weights(file: BinaryIO, contents: _Contents) -> None:
    """Write a safetensors file one weight at a time, so that only one is in memory."""
    dtype: Any = contents.config.dtype
    code, end = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype], 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for weight in contents.weights:
        start, end = end, end + prod(weight.shape) * dtype.itemsize
        header[weight.name] = {"dtype": code, "shape": weight.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for weight in contents.weights:
        file.write(contents.values(weight).flatten().view(torch.uint8).numpy().data)
