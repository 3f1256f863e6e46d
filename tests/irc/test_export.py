"""`irc export`, `verify`, `generate` on a tiny routed model, as a user runs them: what they write, say and refuse."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import irc
from irc import export as export_module
from irc.bundle import save_bundle
from irc.checkpoint import BaseModel
from irc.export import export
from irc.generation import Generator, Sampling
from irc.onnx_folder import MANIFEST
from irc.routed import RoutingSpec, build_routed
from irc.runtime import Runtime, choose_provider

PROMPT = "def parse(text):\n    "
FILES = {"config.json", "genai_config.json", MANIFEST, "model.onnx", "model.onnx.data", "tokenizer.json"}


@pytest.fixture(scope="session")
def bundle(base: BaseModel, shake: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = shake(build_routed(base, RoutingSpec(4), "fp32"))
    model.facts["base"] = base
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    save_bundle(model, folder)
    return folder


@pytest.fixture(scope="session")
def exported(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "routed"
    export(str(bundle), folder)
    return folder


@pytest.fixture(scope="session")
def dense(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "dense"
    export(str(model_folder), folder)
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "copied"))


def verify_arguments(folder: Path, text_file: Path, *more: str) -> list[str]:
    return ["verify", str(folder), "--data", str(text_file), "--tokens", "256", "--seq-len", "16", "--json", *more]


def test_what_export_writes_and_says(bundle: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    shown = irc_main("export", bundle, "-o", tmp_path / "onnx", "--json")
    assert shown.code == 0, shown.err
    result = shown.json
    assert result["routed_units"] == 4
    assert result["dtype"] == "fp32"
    assert {path.name for path in (tmp_path / "onnx").iterdir()} >= FILES
    assert {path.name for path in tmp_path.iterdir()} == {"onnx"}
    genai = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["num_hidden_layers"] == 2
    again = irc_main("export", bundle, "-o", tmp_path / "onnx")
    assert again.code == 2
    assert "exists already; --force replaces it" in again.sentence()
    assert irc_main("export", bundle, "-o", tmp_path / "onnx", "--force").code == 0


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
    other.facts["base"] = base
    save_bundle(other, tmp_path / "other")
    shown = irc_main(*verify_arguments(exported, text_file, "--bundle", str(tmp_path / "other")))
    assert shown.code == 3
    assert shown.json["max_abs_diff"] > 1e-2


def test_fp16(bundle: Path, text_file: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    assert irc_main("export", bundle, "-o", tmp_path / "half", "--dtype", "fp16").code == 0
    shown = irc_main(*verify_arguments(tmp_path / "half", text_file))
    assert shown.code == 0, shown.err
    assert shown.json["dtype"] == "fp16"


def test_generate_continues_as_pytorch_does(exported: Path, bundle: Path, irc_main: Callable[..., Any]) -> None:
    shown = irc_main("generate", exported, PROMPT, "-n", "20", "--json")
    assert shown.code == 0, shown.err
    result = shown.json
    model, runtime = irc.load(str(bundle)), Generator(Runtime(exported))
    ids = torch.tensor([runtime.encode(PROMPT)])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    wanted = expected[0, ids.shape[1] :].tolist()
    assert result["tokens"] == [token for token in wanted if token not in runtime.end]
    assert 0 < result["skipped"] < 1
    assert result["stopped"] in ("length", "end")
    text = irc_main("generate", exported, PROMPT, "-n", "20")
    assert text.out == PROMPT + result["text"] + "\n"
    assert "of the units' work skipped" in text.err


def test_sampling_is_seeded_and_bounded(exported: Path) -> None:
    generator = Generator(Runtime(exported))
    one, same, other = (
        generator.generate(PROMPT, max_tokens=12, sampling=Sampling(1.0, 50, 0.95, seed)).tokens for seed in (1, 1, 2)
    )
    greedy = generator.generate(PROMPT, max_tokens=12).tokens
    assert one == same
    assert one != other
    assert generator.generate(PROMPT, max_tokens=12, sampling=Sampling(5.0, top_k=1)).tokens == greedy


def test_a_stop_string_ends_the_text_before_it(exported: Path) -> None:
    generator = Generator(Runtime(exported))
    whole = generator.generate(PROMPT, max_tokens=16).text
    mark = whole[5:7]
    pieces: list[str] = []
    result = generator.generate(PROMPT, max_tokens=16, stop=[mark], emit=pieces.append)
    assert result.stopped == "stop"
    assert "".join(pieces) == result.text == whole[: whole.index(mark)]


def test_the_context_ends_the_text(exported: Path) -> None:
    result = Generator(Runtime(exported)).generate("x" * 60, max_tokens=50)
    assert result.stopped in ("context", "end")
    assert result.prompt_tokens + len(result.tokens) <= 64


def test_an_interrupt_ends_the_text_cleanly(exported: Path) -> None:
    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    result = Generator(Runtime(exported)).generate(PROMPT, emit=interrupt)
    assert result.stopped == "interrupted"
    assert len(result.tokens) == 1


def test_forced_decisions_take_the_routers_place(exported: Path, dense: Path) -> None:
    """All executed is the dense model; the logit differences are the routers' own all the same."""
    ids, mask = np.arange(12).reshape(2, 6), np.ones((2, 6), np.int64)
    runtimes = [Runtime(dense), Runtime(exported, forced=True), Runtime(exported)]
    execute = np.ones((4, 2, 6), bool)
    plain = runtimes[0].step(ids, mask, runtimes[0].empty_cache(2))
    forced = runtimes[1].step(ids, mask, runtimes[1].empty_cache(2), execute)
    free = runtimes[2].step(ids, mask, runtimes[2].empty_cache(2))
    np.testing.assert_allclose(forced.logits, plain.logits, atol=1e-4)
    assert forced.execute is execute
    np.testing.assert_allclose(forced.difference[0], free.difference[0], atol=1e-5)
    assert 0 < free.execute.mean() < 1
    same = runtimes[1].step(ids, mask, runtimes[1].empty_cache(2), free.execute)
    np.testing.assert_allclose(same.logits, free.logits, atol=1e-5)


def test_lora_is_merged(
    base: BaseModel, lora_on: Callable[..., Any], text_file: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    model = build_routed(base, RoutingSpec(4), "fp32")
    model.facts["base"] = base
    save_bundle(lora_on(model), tmp_path / "bundle")
    assert irc_main("export", tmp_path / "bundle", "-o", tmp_path / "onnx").code == 0
    names = {tensor.name for tensor in onnx.load(str(tmp_path / "onnx" / "model.onnx")).graph.initializer}
    assert not any("lora" in name for name in names)
    shown = irc_main(*verify_arguments(tmp_path / "onnx", text_file))
    assert shown.code == 0, shown.err
    assert shown.json["max_abs_diff"] <= 1e-4


def test_triton_layout_describes_the_model_it_holds(bundle: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    assert irc_main("export", bundle, "-o", tmp_path / "triton", "--layout", "triton").code == 0
    config = (tmp_path / "triton" / "irc" / "config.pbtxt").read_text()
    session = Runtime(tmp_path / "triton")._session
    kinds = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    for side, values in (("input", session.get_inputs()), ("output", session.get_outputs()[:-1])):
        for value in values:
            sizes = ", ".join(str(size) if isinstance(size, int) else "-1" for size in value.shape)
            line = f'{side} [ {{ name: "{value.name}" data_type: {kinds[value.type]} dims: [ {sizes} ] }} ]'
            assert line in config.splitlines()
    assert config.count("input [") == len(session.get_inputs())
    assert irc_main("generate", tmp_path / "triton", PROMPT, "-n", "3", "--json").code == 0


def damage(folder: Path, how: str) -> None:
    data, manifest = folder / "model.onnx.data", folder / MANIFEST
    if how == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif how == "altered":
        content = bytearray(data.read_bytes())
        content[1000] ^= 1
        data.write_bytes(content)
    elif how == "missing":
        data.unlink()
    elif how == "newer":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"op_version": 99}))
    else:
        manifest.write_text("{")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("truncated", "the file is truncated or was changed; export again"),
        ("altered", "the file is truncated or was changed; export again"),
        ("missing", "the file is missing; export again"),
        ("newer", "op version 99 is newer than this irc knows (1); upgrade irc"),
        ("manifest", "damaged (JSONDecodeError"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "verify"])
def test_a_damaged_folder_is_refused(
    copied: Path, how: str, sentence: str, verb: str, irc_main: Callable[..., Any]
) -> None:
    damage(copied, how)
    shown = irc_main(verb, copied, *([PROMPT] if verb == "generate" else []))
    assert shown.code == 2
    assert sentence in shown.sentence()
    assert shown.out == ""


def test_what_is_no_folder_of_ours_is_refused(bundle: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    assert "export it first: irc export" in irc_main("generate", bundle, "x").sentence()
    assert "not an ONNX folder of irc" in irc_main("verify", tmp_path).sentence()
    (tmp_path / "notes.txt").write_text("mine")
    shown = irc_main("export", bundle, "-o", tmp_path, "--force")
    assert (shown.code, (tmp_path / "notes.txt").read_text()) == (2, "mine")
    assert "exists and is not an ONNX folder of irc" in shown.sentence()
    assert irc_main("export", tmp_path, "-o", tmp_path / "new").code == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "the prompt has no token"),
        ("x" * 64, "the prompt has 64 tokens, the model's context is 64"),
        ("a\udcff", "the prompt is not valid UTF-8"),
    ],
)
def test_prompts_that_cannot_be_continued(
    exported: Path, prompt: str, sentence: str, irc_main: Callable[..., Any]
) -> None:
    shown = irc_main("generate", exported, prompt)
    assert shown.code == 2
    assert sentence in shown.sentence()


@pytest.mark.parametrize(
    "flags", [("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "1.5"), ("--top-k", "-1"), ("-n", "0")]
)
def test_sampling_out_of_range_is_refused(exported: Path, flags: tuple[str, str], irc_main: Callable[..., Any]) -> None:
    assert irc_main("generate", exported, PROMPT, *flags).code == 2


def test_a_data_type_that_the_provider_cannot_run(bundle: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    assert irc_main("export", bundle, "-o", tmp_path / "bf16", "--dtype", "bf16").code == 0
    shown = irc_main("generate", tmp_path / "bf16", PROMPT, "--provider", "cpu")
    assert shown.code == 2
    assert "ONNX Runtime's CPU provider cannot run bf16; export with --dtype fp32 or fp16" in shown.sentence()


def test_cuda_that_does_not_load_is_an_error(exported: Path, irc_main: Callable[..., Any]) -> None:
    if choose_provider("auto") == "cuda":
        pytest.skip("CUDA loads here")
    shown = irc_main("generate", exported, PROMPT, "--provider", "cuda")
    assert shown.code == 2
    assert "provider is 'cuda', but" in shown.sentence()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_export_that_failed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, irc_main: Callable[..., Any], error: BaseException
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        (tmp_path / "onnx.new" / "model.onnx.data").write_bytes(b"half")
        raise error

    monkeypatch.setattr(export_module, "export_onnx", fail)
    shown = irc_main("export", bundle, "-o", tmp_path / "onnx")
    assert shown.code != 0
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        assert shown.code == 1
        assert "could not be written (No space left on device)" in shown.sentence()


def test_bench_prints_what_it_measured(irc_main: Callable[..., Any]) -> None:
    sizes = "--hidden 64 --layers 1 --ffn 96 --heads 4 --kv-heads 2 --prefill 32 --past 8 --decode 2 --rounds 2".split()
    shown = irc_main("bench", "--sparsities", "0,0.5", "--provider", "cpu", "--json", *sizes)
    assert shown.code == 0, shown.err
    result = shown.json
    assert [row["sparsity"] for row in result["results"]] == [0, 0.5]
    for row in result["results"]:
        for name in ("prefill", "decode"):
            figures = row[name]
            assert figures["speedup"] == pytest.approx(figures["dense_ms"] / figures["routed_ms"])
            assert figures["efficiency"] == pytest.approx(figures["speedup"] / figures["ideal"])
    none, half = result["results"]
    assert none["prefill"]["ideal"] < 1 < half["prefill"]["ideal"]
    assert irc_main("bench", "--sparsities", "0.5,2").code == 2
    assert irc_main("bench", "--hidden", "65").code == 2
