"""`irc verify`: what agrees, and what fails by exit code 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from irc.bundle.saving import save_bundle
from irc.model.build import build_routed
from irc.model.checkpoint import BaseModel
from irc.model.routed import RoutingSpec

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
