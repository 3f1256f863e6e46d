"""Writes what is timed: a random Llama, its untrained bundle, a shallower one, and their exports."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from irc.bench.shapes import Shape
from irc.bundle.loading import load, save_bundle
from irc.deployment.onnx_folder import export
from irc.dtypes import torch_dtype
from irc.errors import InputError
from irc.model.build import build_routed
from irc.model.checkpoint import BaseModel, find_base
from irc.model.routed import RoutedForCausalLM, RoutingSpec
from irc.recipe.policies import policy_named, refuse_whole_sequences
from irc.recipe.recipe import default_rank


@dataclass
class Pair:
    """A model in both forms.

    Attributes:
        model: Rewritten, for counting; its weights may be gone.
        base: Folder of the dense model as Hugging Face has it.
        dense: ONNX folder.
        routed: ONNX folder.
    """

    model: RoutedForCausalLM
    base: Path
    dense: Path
    routed: Path


def random_pair(shape: Shape, work: Path, dtype: str, context: int, seed: int, provider: str = "cpu") -> Pair:
    """Write a random Llama and its untrained bundle, and export both in the same way.

    Args:
        shape: Of the model.
        work: Folder to write to.
        dtype: fp32, fp16 or bf16.
        context: Most tokens of a text.
        seed: Of the weights.
        provider: Which they are exported for: cpu or cuda.
    """
    base = random_llama(shape, work / "base", dtype, context, seed)
    found = BaseModel(str(base), base)
    model = build_routed(found, RoutingSpec(default_rank(shape.hidden)), seed=seed)
    model.facts["base"] = found
    save_bundle(model, work / "bundle")
    model.graph.to("meta")  # shapes are all that is counted from here on
    return Pair(model, base, *_exported({"dense": str(base), "routed": str(work / "bundle")}, work, dtype, provider))


def bundle_pair(bundle: str, work: Path, dtype: str, sparsity: float | None, provider: str = "cpu") -> Pair:
    """Export a bundle, and its base model densely.

    Args:
        bundle: Folder of the bundle.
        work: Folder to write to.
        dtype: fp32, fp16 or bf16.
        sparsity: Point of its dial, None for its own.
        provider: Which they are exported for: cpu or cuda.

    Raises:
        InputError: The bundle cannot be run token by token.
    """
    model = load(bundle, sparsity=sparsity)
    assert model.spec is not None
    refuse_whole_sequences(policy_named(model.spec.policy), "be timed")
    base: BaseModel = model.facts["base"]
    dense, routed = work / "dense", work / f"routed-{sparsity}"
    if not dense.exists():
        export(base.name, dense, dtype=dtype, provider=provider)
    export(bundle, routed, dtype=dtype, sparsity=sparsity, provider=provider)
    return Pair(model, base.folder, dense, routed)


def random_llama(shape: Shape, folder: Path, dtype: str, context: int, seed: int) -> Path:
    """Save a Llama with random weights as transformers does; other builders want a tokenizer, so it gets the demo's."""
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
    """Return the shape with a share of the layers left out, at least one staying."""
    return replace(shape, layers=max(1, round(shape.layers * (1 - sparsity))))


def dense_export(shape: Shape, work: Path, dtype: str, context: int, seed: int) -> Path:
    """Write a random Llama and export it densely; the folder lies in `work`."""
    name = f"dense-{shape.layers}"
    if not (work / name).exists():
        base = random_llama(shape, work / f"base-{shape.layers}", dtype, context, seed)
        _exported({name: str(base)}, work, dtype)
    return work / name


def genai_export(base: Path, work: Path, provider: str, dtype: str) -> Path:
    """Build a dense model with onnxruntime-genai's own model builder.

    Raises:
        InputError: It is not installed, or fails.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise InputError("package onnxruntime-genai is not installed")
    output = work / "genai"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(base), "-o", str(output)]
    command += ["-p", dtype, "-e", provider, "-c", str(work / "genai-cache")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise InputError(f"onnxruntime-genai's model builder: {last}")
    return output


def _exported(sources: dict[str, str], work: Path, dtype: str, provider: str = "cpu") -> list[Path]:
    for name, source in sources.items():
        export(source, work / name, dtype=dtype, provider=provider)
    return [work / name for name in sources]
