"""Holds an ONNX folder against the PyTorch bundle that it came from: logits, perplexity, routes, generated tokens."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from exporters.onnx_dtypes import of_weights
from irc.deployment.comparison import quantized_source
from irc.deployment.exact import open_exact
from irc.deployment.exported_source import open_source
from irc.errors import InputError
from irc.evaluation.exported import FolderFigures
from irc.evaluation.texts import NamedText
from irc.model.modules import Record
from irc.model.routed import RoutedForCausalLM
from irc.progress import Progress, ProgressFactory
from irc.runtime.generation import Generator
from irc.runtime.session import Runtime
from irc.text.source import load_text, pick, token_stream, windows

TOLERANCE = 1e-4
"""Largest difference of logits that the rounding of fp32 explains; for 16-bit types see `tolerance_of`."""

_ROUNDINGS = 8

NEAR = 1e-4
"""A route may differ if the two logits of a router are closer than this (fp32); rounding decides there."""

_NEAR = {"fp32": NEAR, "fp16": 2e-2, "bf16": 2e-1}


@dataclass(frozen=True)
class Sample:
    """The text that both models read and continue.

    Attributes:
        data: As for `irc eval`; its held-out part is read.
        tokens: To compare logits on.
        seq_len: Tokens per window.
        prompts: Texts to continue greedily.
        new_tokens: Tokens of each continuation.
    """

    data: str = "stdlib"
    tokens: int = 4_096
    seq_len: int = 128
    prompts: int = 4
    new_tokens: int = 32


def verify(
    folder: Path,
    progress: ProgressFactory,
    sample: Sample = Sample(),
    *,
    bundle: str | None = None,
    base: str | None = None,
    provider: str = "auto",
    ops: str = "auto",
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Compare an ONNX folder with PyTorch on real text.

    Args:
        folder: The output of `irc export`.
        progress: Makes progress bars.
        sample: The text that both read and continue.
        bundle: What it was exported from; by default the source that the folder names.
        base: Where the bundle's base model is, if it has moved.
        provider: Execution provider of ONNX Runtime.
        ops: Kernels of the operators of domain `irc`, as for `Runtime`.
        tolerance: Largest absolute difference of logits; by default `tolerance_of`.

    Returns:
        What `irc verify --json` prints; `ok` says whether both agree.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance is {tolerance}; give 0 or more", options=("tolerance",))
    runtime = open_exact(folder, provider, ops=ops)
    data, seq_len, new_tokens = sample.data, sample.seq_len, sample.new_tokens
    _check_lengths(runtime.exported.manifest.get("context_length"), seq_len, new_tokens if sample.prompts else 0)
    dtype = runtime.exported.dtype
    how = runtime.exported.quantization
    source, opened = open_source(folder, runtime.exported, bundle, base, None if how is None else "fp32")
    quantized = quantized_source(folder, runtime, bundle, base)
    model = opened if quantized is None else quantized
    text = windows(token_stream(load_text(data).split("heldout"), model.base.tokenizer), seq_len, data)
    chosen = pick(text, sample.tokens)
    totals = _Totals(runtime, _NEAR[dtype])
    with progress("verify", len(chosen)) as bar:
        for index, window in enumerate(chosen):
            totals.add(model, window[None])
            bar.update(index + 1, max_abs_diff=totals.worst)
    continued = pick(text, sample.prompts * seq_len)[: sample.prompts if totals.finite else 0]
    with progress("continuations", len(continued)) as bar:
        same, generated = _generated(model, runtime, continued, new_tokens, bar)
    beside = None
    if quantized is not None and totals.finite:
        figures = FolderFigures(Runtime(folder, provider, ops=ops), opened, quantized)
        with progress("fidelity", len(chosen)) as bar:
            beside = {"side": figures.name, **figures.measure(NamedText(data, chosen), bar)}
    limit = tolerance_of(dtype, totals.largest if totals.finite else 0) if tolerance is None else tolerance
    return {
        "model": str(folder),
        "bundle": source,
        "provider": runtime.provider,
        "ops": runtime.ops,
        "dtype": dtype,
        "quantization": None if how is None else asdict(how),
        "data": {"name": data, "split": "heldout", "tokens": int(chosen.numel()), "seq_len": seq_len},
        "finite": totals.finite,
        "max_abs_diff": totals.worst,
        "tolerance": limit,
        "perplexity": {"pytorch": totals.perplexity("pytorch"), "onnxruntime": totals.perplexity("onnxruntime")},
        **totals.routing(),
        **({} if beside is None else {"quantized": beside}),
        "generated": {"prompts": generated, "identical": same, "new_tokens": new_tokens},
        "ok": totals.finite and totals.worst <= limit and totals.flips == 0 and (dtype != "fp32" or same == generated),
    }


def _larger(known: float, values: torch.Tensor) -> float:
    """Return the largest absolute value; infinity if one is NaN."""
    largest = values.abs().max().item()
    return max(known, math.inf if math.isnan(largest) else largest)


def _check_lengths(context: int | None, seq_len: int, new_tokens: int) -> None:
    if context is None:
        return
    if seq_len > context:
        raise InputError(
            f"seq_len is {seq_len}, the model's context is {context}; give at most {context}", options=("seq_len",)
        )
    if new_tokens and seq_len // 2 + new_tokens > context:
        most = context - seq_len // 2
        raise InputError(
            f"new_tokens is {new_tokens}, which leaves the model's context; give at most {most}",
            options=("new_tokens",),
        )


def tolerance_of(dtype: str, largest: float) -> float:
    """Return the largest difference of logits that rounding explains.

    Args:
        dtype: `fp32`: 1e-4. `fp16`, `bf16`: eight units in the last place of the largest logit, for rounding adds up
            over the layers.
        largest: Largest absolute logit.
    """
    if dtype == "fp32":
        return TOLERANCE
    rounding = of_weights(dtype).rounding
    assert rounding is not None
    return _ROUNDINGS * rounding * 2.0 ** math.floor(math.log2(max(1.0, largest)))


class _Totals:
    """Running comparison over windows."""

    def __init__(self, runtime: Runtime, near: float) -> None:
        self.runtime, self.near = runtime, near
        self.units = [decision.unit for decision in runtime.exported.decisions]
        self.worst = self.largest = 0.0
        self.flips, self.rounding, self.windows, self.left_out = 0, 0, 0, 0
        self.agree = dict.fromkeys(self.units, 0)
        self.loss = {"pytorch": 0.0, "onnxruntime": 0.0}
        self.tokens = self.predicted = 0

    @torch.no_grad()
    def add(self, model: RoutedForCausalLM, ids: torch.Tensor) -> None:
        """Compare one window [1, tokens]; logits from the first route on that rounding flipped are left out."""
        tape: dict[str, Record] = {}
        with model.control.using(mode="route", tape=tape):
            expected = model(input_ids=ids, use_cache=False).logits.float()
        step = self.runtime.step(ids.numpy(), np.ones(ids.shape, np.int64), self.runtime.empty_cache(1))
        found = torch.from_numpy(step.logits)
        for name, logits in (("pytorch", expected), ("onnxruntime", found)):
            self.loss[name] += F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        self.largest = _larger(self.largest, expected)
        self.tokens += ids.numel()
        self.predicted += ids.numel() - 1
        self.windows += 1
        first = ids.shape[1]  # the first token whose route differs; what comes before it must agree
        for index, unit in enumerate(self.units):
            record = tape[unit]
            same = record.execute == torch.from_numpy(step.execute[index])
            self.agree[unit] += int(same.sum())
            assert record.difference is not None
            flip = int((~same[0]).int().argmax()) if not bool(same.all()) else first
            # Later flips, and flips of later units at the same token, follow from the first.
            if flip < first and record.difference[0, flip].abs().item() <= self.near:
                self.rounding, first = self.rounding + 1, flip
            elif flip < first:
                self.flips += 1
        self.left_out += ids.shape[1] - first
        if first:
            self.worst = _larger(self.worst, (expected - found)[:, :first])

    @property
    def finite(self) -> bool:
        """Whether all logits of both sides were finite numbers."""
        return math.isfinite(self.worst) and math.isfinite(self.largest)

    def perplexity(self, name: str) -> float:
        """Return the perplexity of one side."""
        return math.exp(self.loss[name] / max(1, self.predicted))

    def routing(self) -> dict[str, Any]:
        """Return the JSON keys about routes."""
        if not self.units:
            return {"routing_agreement": None}
        pairs = self.tokens * len(self.units)
        return {
            "routing_agreement": sum(self.agree.values()) / pairs,
            "flips": {"by_rounding": self.rounding, "other": self.flips, "tokens_left_out": self.left_out},
            "units": {unit: {"routing_agreement": count / self.tokens} for unit, count in self.agree.items()},
        }


@torch.no_grad()
def _generated(model: Any, runtime: Runtime, texts: torch.Tensor, count: int, bar: Progress) -> tuple[int, int]:
    """Continue the first half of each text greedily with both; returns identical ones, and all."""
    generator = Generator(runtime)
    model.generation_config = GenerationConfig(eos_token_id=sorted(generator.end) or None)  # no penalties either
    same = 0
    for done, window in enumerate(texts, start=1):
        prompt = window[: max(1, len(window) // 2)]
        expected = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=count, do_sample=False
        )[0, len(prompt) :]
        found = generator.continue_ids(prompt.tolist(), count)
        wanted = expected.tolist()
        end = next((i for i, token in enumerate(wanted) if token in generator.end), len(wanted))
        same += found == wanted[:end]
        bar.update(done, identical=same)
    return same, len(texts)
