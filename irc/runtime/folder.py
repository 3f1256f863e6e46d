"""An ONNX folder that `irc export` wrote: its manifest and hashes are checked before anything in it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.onnx_dtypes import FLOATS
from exporters.onnx_format import (
    BLOCK_SIZES,
    DATA,
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    PAST_FROM,
    QUANTIZED,
    ROUNDINGS,
    VERSION,
    CacheShape,
    Decision,
    Quantization,
)
from irc.errors import InputError
from irc.files.atomic import file_sha256
from irc.files.untrusted import check_links, check_plain, check_pulled, read_json

BUNDLE_FILE = "irc_config.json"
"""The file that tells a bundle from an ONNX folder; `irc.bundle` defines its name too."""


@dataclass(frozen=True)
class OnnxFolder:
    """A checked folder.

    Attributes:
        folder: Its path.
        model: Path of `model.onnx`.
        manifest: The content of `irc.json`.
    """

    folder: Path
    model: Path
    manifest: dict[str, Any]

    @property
    def weights(self) -> list[str]:
        """Names of the files beside the model whose hashes were checked."""
        return [name for name in self.manifest["sha256"] if name != MODEL]

    @property
    def cache(self) -> CacheShape:
        """Shape of the key/value cache."""
        return CacheShape(**self.manifest["cache"] | {"reduced": tuple(self.manifest["cache"].get("reduced", ()))})

    @property
    def decisions(self) -> list[Decision]:
        """Where each routed unit says what it decided; empty for a dense model."""
        return [Decision(u["unit"], u["difference"]) for u in self.manifest["units"]]

    @property
    def source(self) -> str:
        """What was exported: a name, or the path of a folder."""
        source = str(self.manifest["source"])
        return str((self.folder / source).resolve()) if source.startswith(".") else source

    @property
    def dial(self) -> float | None:
        """The sparsity that a bundle was set to for the export; None for its own."""
        return self.manifest.get("dial")

    @property
    def dial_flops(self) -> float | None:
        """The FLOPs ratio that a bundle was set to for the export; None for its own."""
        return self.manifest.get("dial_flops")

    @property
    def counts_past_by_mask(self) -> bool:
        """Whether caches may have room for more tokens than they hold; folders of early versions may not."""
        return bool(self.manifest.get("past_from") == PAST_FROM)

    @property
    def dtype(self) -> str:
        """The type that the model computes in: `fp32`, `fp16` or `bf16`."""
        return str(self.manifest["dtype"])

    @property
    def quantization(self) -> Quantization | None:
        """How the base's weights are stored in blocks of 4 or 8 bits; None if they are not."""
        found = self.manifest.get("quantization")
        return None if found is None else Quantization(**found)


def open_folder(path: Path, oldest: int = FORMAT_VERSION) -> OnnxFolder:
    """Read and check an ONNX folder.

    Args:
        path: Of the folder.
        oldest: The oldest format version to accept; only the current one runs.

    Raises:
        InputError: It is not an ONNX folder, it is damaged or altered, or its format or operator version is newer or
            older than what is accepted.
    """
    if not path.exists():
        raise InputError(f"{path}: folder not found; give one that irc export wrote")
    if not (path / MANIFEST).is_file():
        bundle = (path / BUNDLE_FILE).is_file()
        hint = f"export it first: irc export {path} -o DIR" if bundle else "make one with irc export"
        raise InputError(f"{path}: not an ONNX folder of irc ({MANIFEST} is missing); {hint}")
    manifest = _read_manifest(path)
    if manifest["format_version"] < oldest:
        raise InputError(
            f"{path}: format version {manifest['format_version']} is older than this irc runs ({oldest}); rewrite the "
            f"folder once: irc export --upgrade {path}"
        )
    model = _find_model(path)
    for folder in {path, model.parent}:
        check_links(folder)
    _check_hashes(model, manifest["sha256"])
    return OnnxFolder(path, model, manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_json(path / MANIFEST)
        for key, known in (("format_version", FORMAT_VERSION), ("op_version", VERSION)):
            if type(manifest[key]) is not int:
                raise TypeError(f"{key} is not a whole number")
            if manifest[key] > known:
                what = key.replace("_", " ")
                raise InputError(f"{path}: {what} {manifest[key]} is newer than this irc knows ({known}); upgrade irc")
        hashes = dict(manifest["sha256"])
        _check_types(manifest, hashes.values())
        for name in hashes:
            check_plain(name, path / MANIFEST)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path / MANIFEST}: damaged ({type(error).__name__}: {error}); export again") from error
    return manifest | {"sha256": hashes}


def _find_model(path: Path) -> Path:
    """Return the path of the model: beside the manifest, or where the layout of a Triton repository has it."""
    found = [place for place in (path / MODEL, *sorted(path.glob(f"*/*/{MODEL}"))) if place.is_file()]
    if not found:
        raise InputError(f"{path / MODEL}: the file is missing; export again")
    # A link to a folder outside would take the model's files with it.
    if not found[0].parent.resolve().is_relative_to(path.resolve()):
        raise InputError(f"{found[0].parent}: is a link that leads out of its folder; put the file itself there")
    return found[0]


def _check_hashes(model: Path, hashes: dict[str, str]) -> None:
    for name in sorted({MODEL, DATA} | set(hashes)):
        file = model.with_name(name)
        if not file.is_file():
            raise InputError(f"{file}: the file is missing; export again")
        if file_sha256(file) != hashes.get(name):
            check_pulled(file)
            raise InputError(
                f"{file}: its hash is not the one in {MANIFEST}: the file is truncated or was changed; export again"
            )


def _check_types(manifest: dict[str, Any], hashes: Iterable[Any]) -> None:
    """Raise ValueError or TypeError where the manifest holds a type or value that `irc export` never writes."""
    if manifest["format_version"] < 1:
        raise ValueError(f"format_version is {manifest['format_version']!r}")
    cache = CacheShape(**manifest["cache"])
    numbers = [cache.layers, cache.heads, cache.size, *cache.reduced]
    if any(type(number) is not int or number < 0 for number in numbers):
        raise TypeError("the cache's shape is not made of whole numbers")
    if manifest["dtype"] not in [kind.short for kind in FLOATS]:
        raise ValueError(f"dtype is {manifest['dtype']!r}")
    if (found := manifest.get("quantization")) is not None:
        how = Quantization(**found)
        sizes = how.bits, how.block_size, how.accuracy_level
        known = how.bits in QUANTIZED.values() and how.block_size in BLOCK_SIZES and how.accuracy_level in (0, 4)
        known = known and how.rounding in ROUNDINGS and type(how.symmetric) is bool
        if not known or any(type(size) is not int for size in sizes):
            raise ValueError(f"quantization is {found!r}")
    context = manifest.get("context_length")
    if context is not None and (type(context) is not int or context < 1):
        raise TypeError(f"context_length is {context!r}, not a whole number of tokens")
    for unit in manifest["units"]:
        if any(not isinstance(unit[key], str) for key in ("unit", "difference")):
            raise TypeError("a unit has no decision")
    if any(not isinstance(value, str) for value in hashes):
        raise TypeError("a hash is not text")
    if not isinstance(manifest["source"], str) or not isinstance(manifest["base"], dict):
        raise TypeError("source or base has another type")
    for key in ("kv_threshold", "sparsity", "dial", "dial_flops"):
        if manifest.get(key) is not None and type(manifest[key]) not in (int, float):
            raise TypeError(f"{key} is not a number")
