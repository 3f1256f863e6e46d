"""Writes the models to time: a random Llama, its untrained bundle, a shallower Llama, and their exports."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from irc.bench.precision import Precision
from irc.bench.shapes import Shape
from irc.bundle.loading import load
from irc.bundle.saving import save_bundle
from irc.bundle.source import ModelSource
from irc.deployment.onnx_folder import ExportOptions, export
from irc.dtypes import torch_dtype
from irc.errors import InputError
from irc.model.build import build_routed, default_spec
from irc.model.checkpoint import BaseModel, find_base
from irc.model.routed import RoutedForCausalLM
from irc.recipe.policies import policy_named, refuse_whole_sequences
from irc.recipe.target import Target, value_of


@dataclass
class ModelPair:
    """A model in its dense and its routed form.

    Attributes:
        model: The rewritten model, for counting FLOPs. Its weights may be on the meta device.
        base: Folder of the dense model in the format of transformers.
        dense: ONNX folder of the dense model.
        routed: ONNX folder of the routed model.
    """

    model: RoutedForCausalLM
    base: Path
    dense: Path
    routed: Path


def random_pair(
    shape: Shape, work: Path, precision: Precision, context: int, seed: int, provider: str = "cpu"
) -> ModelPair:
    """Write a random Llama and its untrained bundle, and export both with the same settings.

    Args:
        shape: Sizes of the model.
        work: Folder to write to.
        precision: Of weights, and of everything else.
        context: Longest text, in tokens.
        seed: Seed of the weights.
        provider: Execution provider to export for: cpu or cuda.
    """
    base = random_llama(shape, work / "base", precision.computed, context, seed)
    model = build_routed(BaseModel(str(base), base), default_spec(shape.hidden), seed=seed)
    save_bundle(model, work / "bundle")
    model.graph.to("meta")  # from here on only shapes are needed
    sources = {"dense": str(base), "routed": str(work / "bundle")}
    return ModelPair(model, base, *_exported(sources, work, precision, provider))


def bundle_pair(
    bundle: str, work: Path, precision: Precision, target: Target | None, provider: str = "cpu"
) -> ModelPair:
    """Export a bundle and its dense base model.

    Args:
        bundle: Folder of the bundle.
        work: Folder to write to.
        precision: Of weights, and of everything else.
        target: Point of the bundle's dial, or None for its own target.
        provider: Execution provider to export for: cpu or cuda.

    Raises:
        InputError: The bundle's policy needs whole sequences, so it cannot generate token by token.
    """
    sparsity, flops = value_of(target, "sparsity"), value_of(target, "flops")
    model = load(bundle, sparsity=sparsity, flops=flops)
    assert model.spec is not None
    refuse_whole_sequences(policy_named(model.spec.policy), "be timed")
    base = model.base
    dense, routed = work / "dense", work / f"routed-{target}"
    options = ExportOptions(provider=provider, quantization=precision.quantization)
    if not dense.exists():
        export(ModelSource(base.name, dtype=precision.computed), dense, options)
    export(ModelSource(bundle, base, precision.computed, sparsity=sparsity, flops=flops), routed, options)
    return ModelPair(model, base.folder, dense, routed)


def random_llama(shape: Shape, folder: Path, dtype: str, context: int, seed: int) -> Path:
    """Save a Llama with random weights in the format of transformers, with the demo's tokenizer for other builders."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype(dtype))
    try:
        LlamaForCausalLM(shape.config(context)).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    for file in find_base("demo").folder.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


def shallower(shape: Shape, sparsity: float) -> Shape:
    """Return the shape with a share of its layers removed; at least one layer stays."""
    return replace(shape, layers=max(1, round(shape.layers * (1 - sparsity))))


def dense_export(shape: Shape, work: Path, precision: Precision, context: int, seed: int) -> Path:
    """Write a random Llama to `work` and export it; return the ONNX folder."""
    name = f"dense-{shape.layers}"
    if not (work / name).exists():
        base = random_llama(shape, work / f"base-{shape.layers}", precision.computed, context, seed)
        _exported({name: str(base)}, work, precision)
    return work / name


def genai_export(base: Path, work: Path, provider: str, precision: Precision) -> Path:
    """Export a dense model with the model builder of onnxruntime-genai.

    Raises:
        InputError: The package is not installed, or the builder failed.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise InputError(
            "peer genai needs the package onnxruntime-genai; install it with: pip install onnxruntime-genai"
        )
    output = work / "genai"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(base), "-o", str(output)]
    command += ["-p", precision.name, "-e", provider, "-c", str(work / "genai-cache")]
    command += _genai_options(precision)
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        last_line = (finished.stderr.strip() or "no error message").splitlines()[-1]
        raise InputError(f"the model builder of onnxruntime-genai failed: {last_line}")
    return output


def _genai_options(precision: Precision) -> list[str]:
    """Return the options with which genai's builder quantizes as the export does."""
    how = precision.quantization
    if how is None:
        return []
    given = {
        "block_size": how.block_size,
        "accuracy_level": how.accuracy_level,
        "is_symmetric": str(how.symmetric).lower(),
    }
    return ["--extra_options", *(f"{name}={value}" for name, value in given.items())]


def _exported(sources: dict[str, str], work: Path, precision: Precision, provider: str = "cpu") -> list[Path]:
    """Export models by the name of their folder; return the folders."""
    for name, source in sources.items():
        options = ExportOptions(provider=provider, quantization=precision.quantization)
        export(ModelSource(source, dtype=precision.computed), work / name, options)
    return [work / name for name in sources]
