"""Finds the safetensors files with a model's weights, and says what a folder without them holds instead."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from irc.errors import InputError
from irc.files.untrusted import check_plain, read_json

log = logging.getLogger(__name__)

_SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_ZERO = "belongs to a DeepSpeed ZeRO checkpoint; run zero_to_fp32.py to write the whole weights"
_PEFT = "belongs to a PEFT adapter; merge it with merge_and_unload() and save the result, or give its base"
_VARIANT = "is a variant; load it with from_pretrained(..., variant=...) and save it without a variant"
# Files by which people know where their weights went, and what to do; the first that is there is told.
_INSTEAD = {
    _ADAPTER: _PEFT,
    "zero_to_fp32.py": _ZERO,
    "global_step*": _ZERO,
    "pytorch_model_fsdp*": "belongs to an FSDP checkpoint; run accelerate merge-weights",
    "adapter_model*": _PEFT,
    "model.*.safetensors": _VARIANT,
    "model-?????-of-?????.*.safetensors": _VARIANT,
    "consolidated*.safetensors": "has Mistral's own names; give a checkpoint in the format of transformers",
    "pytorch_model*.bin": "is pickled, and pickles are never loaded; load it with transformers and save it again",
    "*.gguf": "is a GGUF file; give it itself, or a folder without config.json that holds it",
    "checkpoint-*": "is a checkpoint of a training; give it instead",
}


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return the safetensors files with a model's weights, in order.

    As in transformers, `model.safetensors` is taken even if there is an index. Shards without an index are taken if
    their names say that all of them are there.

    Args:
        folder: Folder of the model.
        name: What errors call it.

    Raises:
        InputError: One is missing, or the index names one outside of the folder.
    """
    index = folder / INDEX
    single = (folder / _SINGLE).is_file()
    if (folder / _ADAPTER).is_file() and (single or index.is_file()):
        log.warning("%s: the adapter beside the weights (%s) is not used; merge it first", name, _ADAPTER)
    if single:
        if index.is_file():
            log.warning("%s: holds %s and %s; the first is used, as in transformers", name, _SINGLE, INDEX)
        return [folder / _SINGLE]
    names = _indexed(index) if index.is_file() else _numbered(folder, name)
    missing = [shard for shard in names if not (folder / shard).is_file()]
    if not names or missing == names:
        lacks = missing[0] if missing else _SINGLE
        raise InputError(f"{name}: {lacks} is missing; {what_instead(folder) or _other_safetensors(folder)}")
    if missing:
        raise InputError(
            f"{name}: {missing[0]} is missing, one of {len(names)} shards; complete the folder, or save the model again"
        )
    return [folder / shard for shard in names]


def what_instead(folder: Path) -> str | None:
    """Return what a folder holds instead of a model's files, and what to do; None if it holds nothing known."""
    found = ((path.name, said) for pattern, said in _INSTEAD.items() for path in sorted(folder.glob(pattern)))
    return next((f"{file} {said}" for file, said in found), None)


def _other_safetensors(folder: Path) -> str:
    others = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    if not others:
        return "the folder holds no other safetensors; save the model again with transformers"
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"the folder holds {others[0]}{more}; if that is the model, give it the name that transformers reads"


def _indexed(index: Path) -> list[str]:
    try:
        names = set(read_json(index)["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: not a safetensors index") from error
    return [check_plain(name, index) for name in sorted(names, key=str)]


def _numbered(folder: Path, name: str) -> list[str]:
    """Return the names of all shards of the set to which the shards in a folder belong."""
    totals = sorted({found[2] for path in folder.iterdir() if (found := _SHARD.fullmatch(path.name))})
    if len(totals) > 1:
        raise InputError(
            f"{name}: holds shards of {totals[0]} and of {totals[1]}, and no {INDEX}; delete those of one checkpoint"
        )
    return [f"model-{i:05}-of-{total}.safetensors" for total in totals for i in range(1, int(total) + 1)]
