"""Rewrites an ONNX folder of an older format version, so that today's runtime opens it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporters.onnx_format import DATA, DOMAIN, FORMAT_VERSION, MANIFEST, MODEL, MODEL_VERSION, Decision
from exporters.onnx_interface import complete_interface
from irc import __version__
from irc.deployment.model_file import load_model, save_model
from irc.deployment.onnx_folder import relative_source, without_folder
from irc.deployment.tokenizer_files import write_tokenizer
from irc.errors import InputError
from irc.files.atomic import file_sha256, staged
from irc.runtime.folder import OnnxFolder, open_folder


def upgrade(folder: Path) -> dict[str, Any]:
    """Rewrite an ONNX folder into today's format: all of it, or nothing if a step fails.

    The weights keep their bytes, and the model computes the same numbers.

    Args:
        folder: The output of an earlier `irc export`, of either layout; a folder of today's format stays as it is.

    Returns:
        What `irc export --upgrade --json` prints; `from_version` is the version that was found.

    Raises:
        InputError: The folder is damaged or cannot be replaced.
    """
    started = time.monotonic()
    exported = open_folder(folder, oldest=1)
    found = exported.manifest["format_version"]
    if found < FORMAT_VERSION:
        model = load_model(exported)
        _check_decisions(model.graph, exported.decisions, folder / MANIFEST)
        complete_interface(model, exported.decisions, exported.cache.layers)
        model.producer_name, model.producer_version = "irc", __version__
        model.doc_string = f"Rewritten by irc {__version__} from format version {found}."
        model.model_version = MODEL_VERSION
        with staged(folder) as staging:
            shutil.copytree(folder, staging, copy_function=_copy, dirs_exist_ok=True)
            place = staging / exported.model.relative_to(folder)
            save_model(model, place)
            write_tokenizer(folder, str(folder), staging)
            _write_manifest(exported, place, staging / MANIFEST)
            open_folder(staging)
    return {
        "model": str(folder),
        "from_version": found,
        "format_version": FORMAT_VERSION,
        "routed_units": len(exported.decisions),
        "seconds": {"upgrade": round(time.monotonic() - started, 2)},
    }


def _copy(source: str, target: str) -> str:
    """Copy a file; weights, which nothing changes, become one file with two names where the disk can do that."""
    if Path(source).name == DATA:
        try:
            os.link(os.path.realpath(source), target)
            return target
        except OSError:
            pass  # this disk knows no such links
    return str(shutil.copyfile(source, target))


def _write_manifest(exported: OnnxFolder, model: Path, path: Path) -> None:
    manifest, base = exported.manifest, exported.manifest["base"]
    units = [{key: unit.get(key) for key in ("unit", "difference", "keep_ratio")} for unit in manifest["units"]]
    changed = {
        "format_version": FORMAT_VERSION,
        "irc_version": __version__,
        "source": relative_source(manifest["source"], exported.folder),
        "sparsity": _sparsity(units, manifest.get("sparsity")),
        "dial": manifest.get("sparsity"),  # as older versions named it
        "base": base | ({"name": without_folder(base["name"])} if isinstance(base.get("name"), str) else {}),
        "units": units,
        "sha256": manifest["sha256"] | {MODEL: file_sha256(model)},
    }
    path.write_text(json.dumps(manifest | changed, indent=2) + "\n", encoding="utf-8")


def _sparsity(units: Sequence[Mapping[str, Any]], dial: float | None) -> float | None:
    """Return the share of skipped (token, unit) pairs, as export writes it; None if it was neither measured nor set."""
    kept = [unit["keep_ratio"] for unit in units]
    if dial is not None or any(type(share) not in (int, float) for share in kept):
        return dial
    return 1 - sum(kept) / len(kept) if kept else 0.0


def _check_decisions(graph: ir.Graph, decisions: Sequence[Decision], path: Path) -> None:
    """Compare the units that a manifest lists with those that the graph decides about.

    Raises:
        InputError: The manifest lists a unit twice or one that the graph lacks, or leaves one out.
    """
    routed, listed = list(_differences(graph)), [decision.difference for decision in decisions]
    for decision in decisions:
        name = f"{path}: unit {decision.unit[:80]}"
        if decision != Decision.of(decision.unit) or decision.difference not in routed:
            raise InputError(f"{name} is not one that the model routes; export again")
        if listed.count(decision.difference) > 1:
            raise InputError(f"{name} is listed twice; export again")
    if left := [difference for difference in routed if difference not in listed]:
        counts = f"{len(listed)} of the model's {len(routed)} routed units"
        raise InputError(f"{path}: lists {counts}, {left[0][:80]} is missing; export again")


def _differences(graph: ir.Graph) -> Iterator[str]:
    """Yield the names of what units decide by: DecideRows reads it, in version 1 a Less before a Not."""

    def source(node: ir.Node | None, kind: str) -> ir.Value | None:
        return node.inputs[0] if node is not None and node.op_type == kind and node.inputs else None

    def maker(value: ir.Value | None) -> ir.Node | None:
        return None if value is None else value.producer()

    for node in graph:
        if node.domain == DOMAIN:
            mask = maker(source(node, "SelectRows"))  # another operator gives the rows of an expert
            difference = source(node, "DecideRows") or source(maker(source(mask, "Not")), "Less")
            if difference is not None and difference.name:
                yield difference.name
