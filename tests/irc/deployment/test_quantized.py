"""Folders with weights in blocks: how they are exported, verified, evaluated, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from exporters.onnx_format import Quantization
from irc.bundle.saving import save_bundle
from irc.console import output
from irc.deployment.moments import Moments
from irc.deployment.onnx_folder import ExportOptions, export
from irc.model.build import build_routed
from irc.model.checkpoint import BaseModel
from irc.model.routed import RoutingSpec

Main = Callable[..., Any]
SIZES = ("--tokens", "256", "--seq-len", "16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, bundle: Path, model_folder: Path) -> dict[str, Path]:
    """A routed and a dense model in int4, and the routed one in int8, in symmetric blocks of 16."""
    place = tmp_path_factory.mktemp("quantized")
    made = {name: place / name for name in ("routed", "dense", "int8")}
    for name, source, how in (
        ("routed", bundle, Quantization()),
        ("dense", model_folder, Quantization(block_size=16)),
        ("int8", bundle, Quantization(8, 16, True, 0)),
    ):
        found = export(str(source), made[name], ExportOptions(quantization=how))
        assert (found["quantization"], found["dtype"]) == (asdict(how), "fp32")
    return made


@pytest.fixture
def wide_console(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables of 160 columns, also if an earlier test has opened the console."""
    monkeypatch.setenv("COLUMNS", "160")
    output._console.cache_clear()
    yield
    output._console.cache_clear()


@pytest.mark.parametrize("kind", ["routed", "dense", "int8"])
def test_verify_agrees_with_pytorch_that_holds_the_same_numbers(
    kind: str, folders: dict[str, Path], text_file: Path, irc_main: Main
) -> None:
    """Routes too: all decisions agree at accuracy level 0, which verify runs whatever the folder's level is."""
    shown = irc_main("verify", folders[kind], "--data", text_file, *SIZES, "--json")
    assert shown.code == 0, shown.err
    result = shown.json
    assert 0 < result["max_abs_diff"] <= 1e-4
    assert result["routing_agreement"] in (None, 1.0)
    found = result["quantized"]
    names = {"routed": ["routed fp32", "dense int4"], "dense": [], "int8": ["routed fp32", "dense int8"]}[kind]
    assert [side["name"] for side in found["between"]] == names
    assert found["side"] == {"routed": "routed int4", "dense": "dense int4", "int8": "routed int8"}[kind]
    assert found["fidelity"]["kl"] > 0


def test_eval_shows_what_skipping_costs_beside_what_quantizing_costs(
    folders: dict[str, Path], bundle: Path, text_file: Path, irc_main: Main, wide_console: None
) -> None:
    arguments = ["--data", text_file, *SIZES, "--split", "heldout", "--yardstick-tokens", "64", "--json"]
    shown, plain = (irc_main("eval", where, *arguments) for where in (folders["routed"], bundle))
    assert shown.code == 0, shown.err
    sides = {side["name"]: side for side in shown.json["between"]}
    assert sides["routed fp32"]["fidelity"]["kl"] == pytest.approx(plain.json["fidelity"]["kl"], rel=1e-3)
    assert sides["routed fp32"]["perplexity"]["ratio"] == pytest.approx(plain.json["perplexity"]["ratio"], rel=1e-4)
    assert sides["dense int4"]["fidelity"]["kl"] > 0
    assert shown.json["data"]["tokens"] == plain.json["data"]["tokens"]
    assert [text["name"] for text in shown.json["texts"]] == [text["name"] for text in plain.json["texts"]]
    assert shown.json["flops_ratio"] == pytest.approx(plain.json["flops_ratio"], abs=0.05)
    table = irc_main("eval", folders["routed"], "--data", text_file, *SIZES, "--yardstick-tokens", "0").out
    assert all(name in table for name in ("dense int4", "routed fp32", "routed int4")), table


def test_int8_is_closer_than_int4(folders: dict[str, Path], text_file: Path, irc_main: Main) -> None:
    kls = {}
    for kind in ("routed", "int8"):
        shown = irc_main("eval", folders[kind], "--data", text_file, *SIZES, "--yardstick-tokens", "0", "--json")
        kls[kind] = next(side for side in shown.json["between"] if side["name"].startswith("dense"))["fidelity"]["kl"]
    assert kls["int8"] < kls["routed"] / 10


def test_a_folder_in_fp32_is_evaluated_too(exported: Path, text_file: Path, irc_main: Main) -> None:
    shown = irc_main("eval", exported, "--data", text_file, *SIZES, "--yardstick-tokens", "0", "--json")
    assert shown.code == 0, shown.err
    assert (shown.json["side"], shown.json["between"]) == ("routed fp32", [])


def test_a_changed_block_is_found_by_its_hash(
    folders: dict[str, Path], tmp_path: Path, text_file: Path, irc_main: Main
) -> None:
    changed = Path(shutil.copytree(folders["dense"], tmp_path / "changed"))
    data = bytearray((changed / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (changed / "model.onnx.data").write_bytes(bytes(data))
    shown = irc_main("verify", changed, "--data", text_file)
    assert shown.code == 2
    assert "hash" in shown.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--dtype", "fp32", "--block-size", "32"), ("--block-size", "int4")),
        (("--asymmetric",), ("--asymmetric", "int4")),
        (("--dtype", "int4", "--block-size", "48"), ("--block-size", "48", "16")),
        (("--dtype", "int4", "--accuracy-level", "9"), ("--accuracy-level", "9")),
        (("--dtype", "int2"), ("--dtype", "int2", "int4")),
    ],
)
def test_bad_options(
    arguments: tuple[str, ...], parts: tuple[str, ...], model_folder: Path, tmp_path: Path, irc_main: Main
) -> None:
    shown = irc_main("export", model_folder, "-o", tmp_path / "x", *arguments)
    assert shown.code == 2
    assert all(part in shown.err for part in parts), shown.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("found", [{"bits": 8}, {"block_size": 32}, {"symmetric": True}])
def test_blocks_that_are_not_as_the_manifest_says(
    found: dict[str, Any], folders: dict[str, Path], tmp_path: Path, text_file: Path, irc_main: Main
) -> None:
    changed = Path(shutil.copytree(folders["dense"], tmp_path / "changed"))
    manifest = json.loads((changed / "irc.json").read_text())
    manifest["quantization"] |= found
    (changed / "irc.json").write_text(json.dumps(manifest))
    shown = irc_main("verify", changed, "--data", text_file, *SIZES)
    assert shown.code == 2, shown.err
    assert "fit no weight of" in shown.err


def test_fp16_around_the_blocks(bundle: Path, tmp_path: Path, text_file: Path, irc_main: Main) -> None:
    """As exported for CUDA; products stay MatMulNBits on compacted rows."""
    shown = irc_main("export", bundle, "-o", tmp_path / "half", "--dtype", "int4", "--provider", "cuda", "--json")
    assert shown.code == 0, shown.err
    assert shown.json["dtype"] == "fp16"
    assert json.loads((tmp_path / "half" / "irc.json").read_text())["routed_products"] is False
    checked = irc_main("verify", tmp_path / "half", "--data", text_file, *SIZES, "--json")
    assert checked.code == 0, checked.err
    assert [side["name"] for side in checked.json["quantized"]["between"]] == ["routed fp32", "dense int4"]


def test_adapters_are_no_part_of_the_dense_model(
    base: BaseModel, lora_on: Callable[..., Any], text_file: Path, tmp_path: Path, irc_main: Main
) -> None:
    save_bundle(lora_on(build_routed(base, RoutingSpec(4), "fp32")), tmp_path / "bundle")
    assert irc_main("export", tmp_path / "bundle", "-o", tmp_path / "onnx").code == 0
    arguments = ["--data", text_file, *SIZES, "--split", "heldout", "--yardstick-tokens", "0", "--json"]
    folder, plain = (irc_main("eval", tmp_path / name, *arguments) for name in ("onnx", "bundle"))
    assert folder.code == plain.code == 0, folder.err + plain.err
    assert folder.json["fidelity"]["kl"] == pytest.approx(plain.json["fidelity"]["kl"], rel=1e-3)


@pytest.mark.parametrize(
    "found", [{"bits": 3}, {"bits": 4.0}, {"bits": 4, "block_size": 7}, {"symmetric": "x"}, {"wrong": 1}, [4], "int4"]
)
def test_a_damaged_manifest(found: Any, folders: dict[str, Path], tmp_path: Path, irc_main: Main) -> None:
    changed = Path(shutil.copytree(folders["dense"], tmp_path / "changed"))
    manifest = json.loads((changed / "irc.json").read_text())
    (changed / "irc.json").write_text(json.dumps({**manifest, "quantization": found}))
    shown = irc_main("verify", changed)
    assert shown.code == 2
    assert "irc.json: damaged" in shown.err


def test_blocks_of_another_model_are_refused(folders: dict[str, Path], text_file: Path, irc_main: Main) -> None:
    """The source may have been replaced by one of another shape since."""
    shown = irc_main("verify", folders["dense"], "--bundle", "demo", "--data", text_file, *SIZES)
    assert shown.code == 2
    assert "fit no weight of demo" in shown.err


def test_options_that_open_a_bundle_otherwise_are_refused(folders: dict[str, Path], irc_main: Main) -> None:
    shown = irc_main("eval", folders["routed"], "--flops", "0.9")
    assert shown.code == 2
    assert "runs as it was exported" in shown.err


def test_tied_weights_share_their_blocks(folders: dict[str, Path]) -> None:
    model = onnx.load(str(folders["routed"] / "model.onnx"), load_external_data=False)
    packed = [tensor.name for tensor in model.graph.initializer if tensor.name.endswith(".packed")]
    heads = [name for name in packed if "embed" in name or "head" in name]
    assert len(heads) == 1


def with_text(bundle: Path, text: Path, folder: Path) -> Path:
    """Copy a bundle, and let its recipe name a text."""
    shutil.copytree(bundle, folder)
    (folder / "recipe.yaml").write_text(f"data: [{text}]\n")
    return folder


def test_gptq_reads_the_conversions_text_and_says_so(
    bundle: Path, text_file: Path, folders: dict[str, Path], tmp_path: Path, irc_main: Main
) -> None:
    source, folder = with_text(bundle, text_file, tmp_path / "source"), tmp_path / "gptq"
    shown = irc_main("export", source, "-o", folder, "--dtype", "int4", "--rounding", "gptq", "--json")
    assert shown.code == 0, shown.err
    assert shown.json["quantization"]["rounding"] == "gptq"
    assert shown.json["rounding_text"]["name"] == str(text_file)
    assert shown.json["rounding_text"]["tokens"] > 1000
    sizes = [(place / "model.onnx.data").stat().st_size for place in (folder, folders["routed"])]
    assert sizes[0] == sizes[1]
    costs = []
    for place in (folder, folders["routed"]):
        checked = irc_main("verify", place, "--data", text_file, *SIZES, "--json")
        assert checked.code == 0, checked.err
        assert checked.json["max_abs_diff"] <= 1e-4
        sides = {side["name"]: side for side in checked.json["quantized"]["between"]}
        costs.append(sides["dense int4"]["fidelity"]["kl"])
    assert costs[0] < costs[1]


def test_gptq_needs_blocks_and_text(bundle: Path, tmp_path: Path, irc_main: Main) -> None:
    new = tmp_path / "new"
    source = with_text(bundle, tmp_path / "gone.txt", tmp_path / "source")
    for arguments, named in ((("--dtype", "fp32"), "--rounding"), (("--dtype", "int4"), "gone.txt")):
        refused = irc_main("export", source, "-o", new, *arguments, "--rounding", "gptq")
        assert refused.code == 2
        assert named in refused.sentence()
        assert not new.exists()


def test_gptq_says_which_weights_no_token_reached(
    bundle: Path, text_file: Path, tmp_path: Path, irc_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Moments.of
    unread = 0

    def forgetful(self: Moments, weight: torch.Tensor) -> torch.Tensor | None:
        nonlocal unread
        unread += 1
        return found(self, weight) if unread > 2 else None

    monkeypatch.setattr(Moments, "of", forgetful)
    source = with_text(bundle, text_file, tmp_path / "source")
    shown = irc_main("export", source, "-o", tmp_path / "new", "--dtype", "int4", "--rounding", "gptq")
    assert shown.code == 0, shown.err
    assert "2 weights are rounded to the nearest numbers" in " ".join(shown.err.split())
