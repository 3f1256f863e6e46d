"""Exports a bundle or a plain model as an ONNX folder, which is written beside its place and then renamed."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from exporters.genai import genai_config
from exporters.onnx import Description, export_onnx
from exporters.onnx_format import (
    FORMAT_VERSION,
    LEAST_ORT,
    MANIFEST,
    MODEL,
    OPSET,
    PAST_FROM,
    PROVIDERS,
    VERSION,
    CacheShape,
    Quantization,
)
from exporters.onnx_weights import WeightSource
from exporters.triton import write_repository
from irc import __version__
from irc.bundle.config import Measured, SparsityFigures, UnitFigures
from irc.bundle.contents import bundle_of
from irc.bundle.layout import RECIPE
from irc.bundle.loading import open_model
from irc.bundle.source import ModelSource, as_source
from irc.deployment.moments import Moments, gather_moments
from irc.deployment.overflow import warn_of_overflow
from irc.deployment.tokenizer_files import write_tokenizer
from irc.dtypes import LONG_NAMES, short_name
from irc.errors import InputError
from irc.files.atomic import cannot_write, file_sha256, staged
from irc.model.cache import cache_shape
from irc.model.interrupts import interrupts_kept
from irc.model.paging import MappedPages
from irc.model.routed import RoutedForCausalLM
from irc.recipe.policies import policy_named, refuse_whole_sequences
from irc.recipe.target import Target, value_of
from irc.runtime.native import PACKAGE, NativeLibrary, installed_library, load_library
from irc.training.lora import merge_lora
from passes.base import PassError

LAYOUTS = ("onnx", "triton")
TRITON_NAME = "irc"
_KEPT = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class ExportOptions:
    """How a model is exported.

    Attributes:
        layout: `onnx`, or `triton` for a Triton model repository.
        provider: `cpu`, or `cuda` for a model whose native CUDA kernels need no count of rows when it decodes. Every
            provider runs either.
        ops_library: The native operator library that other runtimes register. With layout `triton` its path on the
            server; otherwise a file that is copied into the folder and named for onnxruntime-genai, `auto` for the
            installed one. irc itself loads no library from a folder.
        dump_dir: Where every pass writes the graph before and after it, and the difference.
        force: Replace an ONNX folder at the output.
        quantization: How the base's weights are stored in blocks of 4 or 8 bits; None as they are.
    """

    layout: str = "onnx"
    provider: str = "cpu"
    ops_library: str | None = None
    dump_dir: Path | None = None
    force: bool = False
    quantization: Quantization | None = None

    @property
    def reads_text(self) -> bool:
        """Whether weights are rounded by what they read of a text."""
        return self.quantization is not None and self.quantization.rounding == "gptq"

    def check(self, output: Path) -> None:
        """Refuse options that do not go together.

        Args:
            output: Folder to write.

        Raises:
            InputError: Names the option and its value.
        """
        if self.dump_dir is not None and self.dump_dir.resolve().is_relative_to(output.resolve()):
            raise InputError(
                f"dump_dir is {self.dump_dir}, which is in the output folder that is replaced; choose another folder",
                options=("dump_dir",),
            )
        if self.layout not in LAYOUTS:
            raise InputError(f"layout is '{self.layout}'; choose from {', '.join(LAYOUTS)}")
        if self.provider not in PROVIDERS:
            raise InputError(f"provider is '{self.provider}'; choose from {', '.join(PROVIDERS)}")

    def library_to_copy(self) -> NativeLibrary | None:
        """Return the operator library that is copied into the folder, None for none.

        Raises:
            InputError: It is not installed, not there, or not an operator library of irc, or does not go with the
                layout or the provider.
        """
        if self.ops_library is None:
            return None
        given, options = f"ops_library is {self.ops_library}", ("ops_library",)
        if self.layout == "triton":
            if self.ops_library == "auto":
                raise InputError(f"{given}, but a server needs the path that it has there; give it", options=options)
            return None
        if self.provider != "cpu":
            raise InputError(f"{given}, but onnxruntime-genai gets operators for the CPU alone", options=("provider",))
        if self.ops_library != "auto" and not Path(self.ops_library).is_file():
            raise InputError(
                f"{given}, but there is no such file; give the path of a library, or auto", options=options
            )
        library = installed_library() if self.ops_library == "auto" else load_library(Path(self.ops_library))
        if library is None:
            raise InputError(f"{given}, but package {PACKAGE} is not installed; give a path", options=options)
        if not library.cache_with_room:
            raise InputError(f"{library.path}: is of an earlier version; build it again", options=options)
        return library


def export(
    model: ModelSource | str,
    output: Path,
    options: ExportOptions = ExportOptions(),
) -> dict[str, Any]:
    """Export a bundle, or a plain model densely, as a folder that ONNX Runtime runs.

    Args:
        model: Which model, and how it is opened; always on the CPU.
        output: Folder to write; it appears complete or not at all.
        options: How it is exported.

    Returns:
        What `irc export --json` prints.

    Raises:
        InputError: Something cannot be exported, or `output` must not be replaced.
    """
    try:
        _check_output(output, options.force)
    except OSError as error:
        raise cannot_write(output, error) from error
    options.check(output)
    library = options.library_to_copy()
    source = replace(as_source(model), device="cpu")
    if options.quantization is not None and source.dtype == "auto":
        source = replace(source, dtype="fp16" if options.provider == "cuda" else "fp32")
    started = time.monotonic()
    with staged(output) as staging:  # a place that cannot be written is found before any work is done
        opened = _opened(source, options.reads_text)
        _check_type(opened, options, library)
        moments = gather_moments(opened) if options.reads_text else None
        try:
            manifest = _write(opened, relative_source(source.name, output), staging, options, library, moments)
        except PassError as error:
            raise InputError(f"{source.name}: {error}") from error
        if options.layout == "triton":
            write_repository(staging, TRITON_NAME, options.ops_library)
            (staging / "genai_config.json").unlink(missing_ok=True)  # it names a model beside it, which has moved
    size = sum(path.stat().st_size for path in output.resolve().rglob("*") if path.is_file())
    return {
        "model": str(output),
        "source": source.name,
        "layout": options.layout,
        "dtype": manifest["dtype"],
        "quantization": manifest["quantization"],
        "rounding_text": None if moments is None else {"name": moments.text, "tokens": moments.tokens},
        "provider": options.provider,
        "opset": OPSET,
        "op_version": VERSION,
        "routed_units": len(manifest["units"]),
        "kv_policy": manifest["kv_policy"],
        "reduced_units": len(manifest["cache"]["reduced"]),
        "bytes": size,
        "seconds": {"export": round(time.monotonic() - started, 2)},
    }


def _opened(source: ModelSource, runs: bool) -> RoutedForCausalLM:
    """Open a model for export; LoRA adapters are merged.

    Args:
        source: Which, and in which type.
        runs: Whether the model has to run before it is written.
    """
    in_fp32 = source.dtype in ("fp32", LONG_NAMES["fp32"])  # of fp16 models activations are measured: they run
    opened = open_model(replace(source, as_stored=in_fp32 and not runs))
    if opened.spec is None:
        opened.base.check_finite()  # the base of a bundle was checked when it was converted
    else:
        refuse_whole_sequences(policy_named(opened.spec.policy), "be exported")
    merge_lora(opened)
    return opened


def _check_type(model: RoutedForCausalLM, options: ExportOptions, library: NativeLibrary | None) -> None:
    """Refuse what the type or the key/value policy of an opened model does not allow."""
    dtype = short_name(model.dtype)
    if options.quantization is not None and dtype == "bf16":
        raise InputError(f"{options.quantization.name} computes in fp32 or fp16, not in bf16", options=("dtype",))
    if library is None:
        return
    if model.control.reduced:
        raise InputError(
            "onnxruntime-genai runs no model under key/value policy reduced; leave ops_library out",
            options=("ops_library", "kv_policy"),
        )
    if reason := library.misfit("cpu", dtype):
        raise InputError(f"{library.path}: does not fit the model: {reason}", options=("ops_library",))


def _check_output(output: Path, force: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file():
        raise InputError(
            f"{output}: exists and is not an ONNX folder of irc; choose another folder", options=("output",)
        )
    if not force:
        raise InputError(f"{output}: exists already; replace it or choose another folder", options=("force", "output"))


def _write(
    model: RoutedForCausalLM,
    source: str,
    folder: Path,
    options: ExportOptions,
    library: NativeLibrary | None,
    moments: Moments | None,
) -> dict[str, Any]:
    base, bundle = model.base, bundle_of(model)
    cache = CacheShape(*cache_shape(model.config), reduced=_reduced_layers(model))
    dtype = model.dtype
    stored = model.stored
    weights = [*model.graph.parameters(), *(stored.tensors if stored else ())]
    pages = MappedPages(weights)
    made_of = {"name": base.name} if bundle is None else bundle.config.base.model_dump()
    made_of["name"] = without_folder(made_of["name"])
    found = Measured() if bundle is None else bundle.config.measured
    turned_to = None if bundle is None else bundle.turned_to
    text = _doc_string(model, made_of["name"], found.target)
    description = Description(__version__, text, {"irc.version": __version__}, options.quantization)
    release = partial(pages.release, weights)
    numbers = WeightSource(stored.find if stored else None, release, moments.of if moments else None)
    generation = base.generation.to_dict()  # refused before the work, if it cannot be read
    warn_of_overflow(model)
    with interrupts_kept():
        decisions = export_onnx(
            model.graph,
            cache,
            dtype,
            folder,
            description,
            options.dump_dir,
            options.provider,
            numbers,
        )
    for name in _KEPT:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    write_tokenizer(base.folder, base.name, folder)
    if bundle is not None and RECIPE in bundle.texts:  # how it was made
        (folder / RECIPE).write_text(bundle.texts[RECIPE], encoding="utf-8")
    config = base.config.to_dict() | json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    if library is not None:
        shutil.copyfile(library.path, folder / library.path.name)
    if not cache.reduced:  # onnxruntime-genai knows no cache whose layers differ in length
        named = None if library is None else library.path.name
        _dump(folder / "genai_config.json", genai_config(config, generation, cache, named))
    policy = model.key_policy
    manifest = {
        "format_version": FORMAT_VERSION,
        "irc_version": __version__,
        "op_version": VERSION,
        "opset": OPSET,
        "least_onnxruntime": LEAST_ORT,
        "dtype": short_name(dtype),
        "quantization": asdict(options.quantization) if options.quantization else None,
        "provider": options.provider,
        "routed_products": options.provider == "cuda" and options.quantization is None and bool(decisions),
        "source": source,
        "sparsity": _sparsity(model, found.sparsity),
        "dial": value_of(turned_to, "sparsity"),
        "dial_flops": value_of(turned_to, "flops"),
        "base": made_of,
        "kv_policy": policy.name,
        "kv_threshold": policy.threshold,
        "context_length": config.get("max_position_embeddings"),
        "vocab_size": config["vocab_size"],
        "cache": asdict(cache),
        "past_from": PAST_FROM,
        "units": [asdict(d) | {"keep_ratio": found.units.get(d.unit, UnitFigures()).keep_ratio} for d in decisions],
        "sha256": {path.name: file_sha256(path) for path in sorted(folder.glob(MODEL + "*"))},
    }
    _dump(folder / MANIFEST, manifest)
    return manifest


def _reduced_layers(model: RoutedForCausalLM) -> tuple[int, ...]:
    return tuple(unit.layer for unit in model.units if unit.name in model.control.reduced)


def relative_source(name: str, output: Path) -> str:
    """Return what was exported: a name, or a path relative to the output, which then begins with a dot."""
    if not (Path(name).exists() or Path(name).is_absolute()):
        return name
    relative = Path(os.path.relpath(Path(name).resolve(), output.resolve())).as_posix()
    return relative if relative.startswith("..") else f"./{relative}"


def without_folder(name: str) -> str:
    """Return a model's name, and of a path on this machine its last part alone."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _sparsity(model: RoutedForCausalLM, shares: SparsityFigures) -> float | None:
    """Return the share of skipped (token, unit) pairs: as measured, or where nothing was measured, as asked for."""
    if model.spec is None:
        return 0.0
    return shares.target if shares.realized is None else shares.realized


def _doc_string(model: RoutedForCausalLM, base: str, target: Target | None) -> str:
    """Say for people what the model file holds."""
    if model.spec is None:
        return f"{base}, exported densely by irc {__version__}."
    aim = "" if target is None else f", target {target}"
    return f"{base}, routed by irc {__version__}: policy {model.spec.policy}{aim}."


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
