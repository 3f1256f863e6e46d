"""`irc verify`: what agrees, and what fails by exit code 3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from safetensors.torch import load_file, save_file

from irc.bundle.saving import save_bundle
from irc.deployment import overflow
from irc.model.build import build_plain, build_routed
from irc.model.checkpoint import BaseModel
from irc.model.routed import RoutingSpec
from irc.text.source import TextSource, load_text

PROMPT = "def parse(text):\n    "


def verify_arguments(folder: Path, text_file: Path, *more: str) -> list[str]:
    return ["verify", str(folder), "--data", str(text_file), "--tokens", "256", "--seq-len", "16", "--json", *more]


@pytest.mark.parametrize("kind", ["routed", "dense"])
def test_verify_agrees(kind: str, exported: Path, dense: Path, text_file: Path, irc_main: Callable[..., Any]) -> None:
    shown = irc_main(*verify_arguments(exported if kind == "routed" else dense, text_file))
    assert shown.code == 0, shown.err
    result = shown.json
    assert result["ok"] is True
    assert 0 < result["max_abs_diff"] <= 1e-4
    assert result["provider"] == "cpu"
    assert result["generated"]["identical"] == result["generated"]["prompts"] == 4
    assert result["perplexity"]["onnxruntime"] == pytest.approx(result["perplexity"]["pytorch"], rel=1e-5)
    if kind == "routed":
        assert len(result["units"]) == 4
        assert result["routing_agreement"] > 0.999
    else:
        assert result["routing_agreement"] is None


def test_verify_fails_by_exit_code_3(exported: Path, text_file: Path, irc_main: Callable[..., Any]) -> None:
    shown = irc_main(*verify_arguments(exported, text_file, "--tolerance", "1e-12"))
    assert shown.code == 3
    assert shown.json["ok"] is False


def test_verify_sees_another_model(
    exported: Path, base: BaseModel, text_file: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    other = build_routed(base, RoutingSpec(4), "fp32", seed=2)
    save_bundle(other, tmp_path / "other")
    shown = irc_main(*verify_arguments(exported, text_file, "--bundle", str(tmp_path / "other")))
    assert shown.code == 3
    assert shown.json["max_abs_diff"] > 1e-2


def test_fp16(bundle: Path, text_file: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    assert irc_main("export", bundle, "-o", tmp_path / "half", "--dtype", "fp16").code == 0
    shown = irc_main(*verify_arguments(tmp_path / "half", text_file))
    assert shown.code == 0, shown.err
    assert shown.json["dtype"] == "fp16"


def test_lora_is_merged(
    base: BaseModel, lora_on: Callable[..., Any], text_file: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    model = build_routed(base, RoutingSpec(4), "fp32")
    save_bundle(lora_on(model), tmp_path / "bundle")
    assert irc_main("export", tmp_path / "bundle", "-o", tmp_path / "onnx").code == 0
    names = {tensor.name for tensor in onnx.load(str(tmp_path / "onnx" / "model.onnx")).graph.initializer}
    assert not any("lora" in name for name in names)
    shown = irc_main(*verify_arguments(tmp_path / "onnx", text_file))
    assert shown.code == 0, shown.err
    assert shown.json["max_abs_diff"] <= 1e-4


@pytest.fixture
def overflowing(model_folder: Path, tmp_path: Path) -> Path:
    """A model whose activations are larger than fp16 holds, though its weights are not."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "large"))
    factors = {"down_proj": 3e3, "up_proj": 50.0, "gate_proj": 50.0}
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor * next((factor for part, factor in factors.items() if part in name), 1.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_overflow_of_fp16_is_told_at_export_and_misses_the_gate(
    overflowing: Path, text_file: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    shown = irc_main("export", overflowing, "-o", tmp_path / "half", "--dtype", "fp16")
    assert shown.code == 0, shown.err
    assert "65,504" in shown.err
    assert "infinite" in shown.err
    shown = irc_main(*verify_arguments(tmp_path / "half", text_file))
    assert shown.code == 3, shown.err
    assert (shown.json["finite"], shown.json["ok"], shown.json["max_abs_diff"]) == (False, False, None)
    assert "bf16 or fp32" in shown.sentence()
    shown = irc_main("generate", tmp_path / "half", PROMPT)
    assert (shown.code, "bf16 or fp32" in shown.sentence()) == (1, True)
    assert irc_main("export", overflowing, "-o", tmp_path / "full", "--dtype", "fp32").code == 0
    shown = irc_main(*verify_arguments(tmp_path / "full", text_file, "--tolerance", "1e6"))
    assert (shown.code, shown.json["finite"]) == (0, True)


def test_ordinary_activations_are_no_reason_to_warn(
    model_folder: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    shown = irc_main("export", model_folder, "-o", tmp_path / "half", "--dtype", "fp16")
    assert shown.code == 0, shown.err
    assert "65,504" not in shown.err


def test_penalties_of_the_base_do_not_change_the_comparison(
    model_folder: Path, text_file: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    settings = {"repetition_penalty": 3.0, "do_sample": True, "temperature": 0.7, "eos_token_id": [256, 7]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert irc_main("export", folder, "-o", tmp_path / "onnx").code == 0
    shown = irc_main(*verify_arguments(tmp_path / "onnx", text_file))
    assert shown.code == 0, shown.err


@pytest.mark.parametrize("named", ["hf:owner/text", "gone.txt", "{empty split}"])
def test_the_text_for_the_overflow_is_read_on_this_machine(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """A hub's text that only a file names is not asked for; a text that is gone or too short does not end an export."""
    (tmp_path / "a.txt").write_text("x")
    named = named.replace("{empty split}", str(tmp_path))
    asked = []

    def load(text: str) -> TextSource:
        asked.append(text)
        return load_text(text)

    measured = SimpleNamespace(text=SimpleNamespace(name=named))
    monkeypatch.setattr(overflow, "load_text", load)
    monkeypatch.setattr(overflow, "bundle_of", lambda _: SimpleNamespace(config=SimpleNamespace(measured=measured)))
    name, ids = overflow._sample(build_plain(base, "fp32"))
    assert (name, ids.shape) == ("stdlib", (1, 64))
    assert asked == (["stdlib"] if named.startswith("hf:") else [named, "stdlib"])
