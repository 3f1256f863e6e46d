"""Writes the GGUF file in which llama.cpp runs a dense Llama: the same weights, quantized as its own types allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irc.bench.precision import Precision
from irc.errors import InputError
from irc.files.untrusted import read_json
from irc.model.gguf import gguf_in
from irc.model.weight_files import weight_files

_PLAIN = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_BLOCK = 32  # numbers that share a scale in Q4_0, Q4_1 and Q8_0


def file_type(precision: Precision) -> str:
    """Return the name of llama.cpp's type that is closest to a precision.

    Raises:
        InputError: It has none with such blocks.
    """
    how = precision.quantization
    if how is None:
        return _PLAIN[precision.name]
    if how.block_size != _BLOCK:
        raise InputError(f"peer llama.cpp has blocks of {_BLOCK} numbers, not of {how.block_size}; leave it out")
    return "Q8_0" if how.bits == 8 else "Q4_0" if how.symmetric else "Q4_1"


def llama_cpp_file(base: Path, source: str, work: Path, precision: Precision) -> Path:
    """Return a GGUF file with the weights of a dense model.

    Args:
        base: Folder of the model in the format of transformers.
        source: What was opened as the model. If that is a GGUF file of the wanted type, it is returned itself.
        work: Folder to write to otherwise.
        precision: Of weights.

    Raises:
        InputError: The model is not a Llama that llama.cpp runs, or its sizes do not fit the type's blocks.
    """
    wanted, path = file_type(precision), work / "llama-cpp.gguf"
    given = Path(source)
    found = gguf_in(given) if given.is_dir() else given if given.suffix.lower() == ".gguf" else None
    if found is not None and found.is_file() and _type_of(found) == wanted:
        return found
    if not path.exists():
        write_llama(base, path, wanted)
    return path


def write_llama(base: Path, path: Path, wanted: str) -> None:
    """Write a Llama in the format of transformers as a GGUF file, with placeholders for a vocabulary.

    Vectors stay fp32. Rows of Q and K are put in the order of llama.cpp's rotary embedding, whose pairs are neighbours.

    Args:
        base: Folder with config.json and safetensors files.
        path: The file to write.
        wanted: Type of all matrices: F32, F16, BF16, Q8_0, Q4_0 or Q4_1.

    Raises:
        InputError: See `llama_cpp_file`.
    """
    import gguf

    config = _config(base)
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    _add_metadata(writer, config, wanted)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in _weights(base, config):
        kind = gguf.GGMLQuantizationType[wanted if weight.ndim > 1 else "F32"]
        if kind.name.startswith("Q") and weight.shape[-1] % _BLOCK:
            raise InputError(f"peer llama.cpp cannot store {name} in blocks of {_BLOCK}: it has {weight.shape} numbers")
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise InputError(f"{base}: llama.cpp's Llama has no weight such as {name}; leave the peer out")
        writer.add_tensor(theirs, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _type_of(file: Path) -> str | None:
    import gguf

    field = gguf.GGUFReader(file).fields.get("general.file_type")
    if field is None:
        return None
    return gguf.LlamaFileType(field.contents()).name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _config(base: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(base / "config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    odd = {
        "model_type": config["model_type"] != "llama",
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "rope_parameters": rope.get("rope_type", rope.get("type", "default")) != "default",
    }
    if any(odd.values()):
        name = next(name for name, is_odd in odd.items() if is_odd)
        raise InputError(f"peer llama.cpp runs plain Llamas only, and {base} has another {name}; leave it out")
    config["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    config["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config


def _add_metadata(writer: Any, config: dict[str, Any], wanted: str) -> None:
    import gguf

    kind = gguf.LlamaFileType["ALL_F32" if wanted == "F32" else f"MOSTLY_{wanted}"]
    writer.add_file_type(kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    _add_placeholders(writer, config["vocab_size"])


def _add_placeholders(writer: Any, size: int) -> None:
    """Name the tokens by their numbers: prompts are ids, but llama.cpp's server aborts without a vocabulary."""
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{token}>" for token in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([1] * size)
    writer.add_add_bos_token(False)


def _weights(base: Path, config: dict[str, Any]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the names of transformers and the weights as llama.cpp orders them, one at a time."""
    import torch
    from safetensors import safe_open

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for file in weight_files(base, str(base)):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                    continue
                weight = opened.get_tensor(name).to(torch.float32).numpy()
                count = heads.get(name.split(".")[-2])
                if count is not None:  # halves of a head become neighbours
                    halves = weight.reshape(count, 2, -1, *weight.shape[1:])
                    weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
                yield name, weight
