"""Bundles of every format version load and give the figures that they gave before.

One figure has changed on purpose: the dense perplexity of a bundle with LoRA is now that of the base, and was that of
the base with adapters (288.10).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import irc
from irc.bundle.layout import FORMAT_VERSION
from irc.bundle.source import ModelSource
from irc.evaluation.run import TextChoice, run_evaluation

DATA = Path(__file__).parents[2] / "data"
VERSIONS = range(1, FORMAT_VERSION + 1)


def test_there_is_a_frozen_bundle_of_each_version() -> None:
    assert {path.name for path in DATA.glob("bundle-v*")} == {f"bundle-v{version}" for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_bundle_gives_its_figures(version: int, bars: Callable[[], Any]) -> None:
    folder = DATA / f"bundle-v{version}"
    bundle, base = str(folder / "bundle"), str(folder / "model")
    assert json.loads((folder / "bundle" / "irc_config.json").read_text())["format_version"] == version
    expected = json.loads((folder / "expected.json").read_text())
    dial = [point["target"] for point in expected["sparsity_sweep"]]
    text = str(folder / "text.txt")
    source, choice = ModelSource(bundle, base, device="cpu"), TextChoice(text, split="all", tokens=0)
    found = run_evaluation(source, bars(), choice, sparsities=dial)
    # fp32 sums in another order: single tokens near a threshold may change sides, the dense model may not
    assert found["perplexity"]["dense"] == pytest.approx(expected["perplexity"]["dense"], rel=1e-4)
    assert found["perplexity"]["routed"] == pytest.approx(expected["perplexity"]["routed"], rel=2e-3)
    assert found["flops_ratio"] == pytest.approx(expected["flops_ratio"], rel=2e-3)
    assert found["kv"]["reduced_units"] == expected["kv"]["reduced_units"] > 0
    for key in ("realized", "attention", "ffn"):
        assert found["sparsity"][key] == pytest.approx(expected["sparsity"][key], abs=2e-3), key
    for name, unit in expected["units"].items():
        assert found["units"][name] == pytest.approx(unit, abs=3e-3), name
    for point, before in zip(found["sparsity_sweep"], expected["sparsity_sweep"], strict=True):
        assert {key: point[key] for key in before} == pytest.approx(before, rel=3e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_bundle_generates(version: int) -> None:
    folder = DATA / f"bundle-v{version}"
    model = irc.load(folder / "bundle", base=str(folder / "model"))
    prompt = model.base.tokenizer("the router ", return_tensors="pt")["input_ids"]
    written = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert written.shape == (1, prompt.shape[1] + 6)
