"""export(): from a bundle or a plain model to an ONNX folder, written beside and renamed."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from exporters.genai import genai_config
from exporters.onnx import LEAST_ORT, MODEL, PAST_FROM, PROVIDERS, CacheShape, Description, export_onnx
from exporters.onnx_ops import OPSET, VERSION
from exporters.triton import write_repository
from irc import __version__
from irc.bundle.key_policy import KeyPolicy, key_policy_of
from irc.bundle.loading import RECIPE
from irc.dtypes import short_name
from irc.errors import InputError
from irc.evaluation.run import open_model
from irc.files.atomic import cannot_write, file_sha256, staged
from irc.files.untrusted import first_line, read_json
from irc.model.cache import cache_shape
from irc.model.checkpoint import BaseModel
from irc.model.paging import MappedPages
from irc.model.routed import RoutedForCausalLM
from irc.recipe.policies import policy_named, refuse_whole_sequences
from irc.runtime.folder import FORMAT_VERSION, MANIFEST
from irc.training.lora import merge_lora
from passes.base import PassError

LAYOUTS = ("onnx", "triton")
TRITON_NAME = "irc"
_TEXTS = (".json", ".jinja", ".model", ".txt")
_KEPT = ("config.json", "generation_config.json", "chat_template.jinja", "merges.txt", "vocab.json")


def export(
    name: str,
    output: Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    layout: str = "onnx",
    force: bool = False,
    dump_dir: Path | None = None,
    key_policy: KeyPolicy | None = None,
    sparsity: float | None = None,
    ops_library: str | None = None,
    provider: str = "cpu",
) -> dict[str, Any]:
    """Export a bundle, or a plain model densely, as a folder that ONNX Runtime runs.

    Args:
        name: Bundle, model folder, hub id, or demo.
        output: Folder to write; complete or not there at all.
        base: Where a bundle's base model is, if it has moved.
        dtype: `auto` (as `irc.load` resolves it), `fp32`, `fp16` or `bf16`.
        layout: `onnx`, or `triton` for a Triton model repository.
        force: Replace an ONNX folder at `output`.
        dump_dir: Where every pass leaves its before, after and diff.
        key_policy: Whose keys and values are stored; the bundle's own policy when None.
        sparsity: Another share to skip than the bundle's own, within its dial.
        ops_library: Layout `triton`: path, on the server, of the native operator library to register.
        provider: `cpu`, or `cuda` for a model whose native CUDA kernels need no count of rows when it decodes; either
            runs the other's.

    Returns:
        What `irc export --json` prints.

    Raises:
        InputError: Something cannot be exported, or `output` must not be replaced.
    """
    try:
        _check_output(output, force)
    except OSError as error:
        raise cannot_write(output, error) from error
    if dump_dir is not None and dump_dir.resolve().is_relative_to(output.resolve()):
        raise InputError(f"--dump-dir {dump_dir}: lies in the output, which is replaced; give a folder beside it")
    if layout not in LAYOUTS:
        raise InputError(f"layout is '{layout}'; choose from {', '.join(LAYOUTS)}")
    if ops_library is not None and layout != "triton":
        raise InputError("--ops-library is written into a Triton repository; give --layout triton with it")
    if provider not in PROVIDERS:
        raise InputError(f"provider is '{provider}'; choose from {', '.join(PROVIDERS)}")
    started = time.monotonic()
    with staged(output) as staging:  # a place that cannot be written is found before any work is done
        model = open_model(name, base=base, dtype=dtype, device="cpu", key_policy=key_policy, sparsity=sparsity)
        if model.spec is not None:
            refuse_whole_sequences(policy_named(model.spec.policy), "be exported")
        merge_lora(model)
        try:
            manifest = _write(model, name, staging, dump_dir, provider)
        except PassError as error:
            raise InputError(f"{name}: {error}") from error
        if layout == "triton":
            write_repository(staging, TRITON_NAME, ops_library)
            (staging / "genai_config.json").unlink(missing_ok=True)  # it names a model beside it, which has moved
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return {
        "model": str(output),
        "source": name,
        "layout": layout,
        "dtype": manifest["dtype"],
        "provider": provider,
        "opset": OPSET,
        "op_version": VERSION,
        "routed_units": len(manifest["units"]),
        "kv_policy": manifest["kv_policy"],
        "reduced_units": len(manifest["cache"]["reduced"]),
        "bytes": size,
        "seconds": {"export": round(time.monotonic() - started, 2)},
    }


def _check_output(output: Path, force: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file():
        raise InputError(f"{output}: exists and is not an ONNX folder of irc; give another --output")
    if not force:
        raise InputError(f"{output}: exists already; --force replaces it")


def _write(model: RoutedForCausalLM, name: str, folder: Path, dump_dir: Path | None, provider: str) -> dict[str, Any]:
    base: BaseModel = model.facts["base"]
    cache = CacheShape(*cache_shape(model.config), reduced=_reduced_layers(model))
    facts = model.facts.get("config", {})
    measured = {unit["name"]: unit for unit in facts.get("units", [])}
    dtype = model.dtype
    weights = list(model.graph.parameters())
    pages = MappedPages(weights)
    description = Description(__version__, _doc_string(model, base.name), {"irc.version": __version__})
    release = partial(pages.release, weights)
    generation = _generation(base)  # what cannot be read is refused before the work
    decisions = export_onnx(model.graph, cache, dtype, folder, description, dump_dir, provider, release)
    _copy_texts(base, folder)
    if (bundle := model.facts.get("bundle")) and (bundle / RECIPE).is_file():  # how it was made
        shutil.copyfile(bundle / RECIPE, folder / RECIPE)
    config = base.config.to_dict() | json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    if not cache.reduced:  # onnxruntime-genai knows no cache whose layers differ in length
        _dump(folder / "genai_config.json", genai_config(config, generation, cache))
    policy = key_policy_of(model)
    manifest = {
        "format_version": FORMAT_VERSION,
        "irc_version": __version__,
        "op_version": VERSION,
        "opset": OPSET,
        "least_onnxruntime": LEAST_ORT,
        "dtype": short_name(dtype),
        "provider": provider,
        "source": _source(name),
        "sparsity": model.facts.get("dial"),
        "base": facts.get("base", {"name": base.name}),
        "kv_policy": policy.name,
        "kv_threshold": policy.threshold,
        "context_length": config.get("max_position_embeddings"),
        "vocab_size": config["vocab_size"],
        "cache": asdict(cache),
        "past_from": PAST_FROM,
        "units": [asdict(d) | {"keep_ratio": measured.get(d.unit, {}).get("keep_ratio")} for d in decisions],
        "sha256": {path.name: file_sha256(path) for path in sorted(folder.glob(MODEL + "*"))},
    }
    _dump(folder / MANIFEST, manifest)
    return manifest


def _doc_string(model: RoutedForCausalLM, base: str) -> str:
    """Say for people what the model file holds; of a path on this machine only the last part."""
    name = Path(base).name if Path(base).is_absolute() or Path(base).is_dir() else base
    if model.spec is None:
        return f"{name}, exported densely by irc {__version__}."
    shares = model.facts.get("config", {}).get("sparsity") or {}
    target = f", target sparsity {shares['target']:g}" if "target" in shares else ""
    return f"{name}, routed by irc {__version__}: policy {model.spec.policy}{target}."


def _generation(base: BaseModel) -> dict[str, Any]:
    path = base.folder / "generation_config.json"
    try:
        return read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path}: cannot be used ({first_line(error)}); mend it or remove it") from error


def _reduced_layers(model: RoutedForCausalLM) -> tuple[int, ...]:
    return tuple(unit.layer for unit in model.units if unit.name in model.control.reduced)


def _source(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _copy_texts(base: BaseModel, folder: Path) -> None:
    """Copy configuration and tokenizer; never weights, never code."""
    for path in base.folder.iterdir():
        of_tokenizer = path.name.startswith(("tokenizer", "special_tokens")) and path.suffix in _TEXTS
        if path.is_file() and (path.name in _KEPT or of_tokenizer):
            shutil.copyfile(path, folder / path.name)


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
