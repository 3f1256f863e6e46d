"""The peer llama.cpp of `irc bench`: it runs the same model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from irc.bench.llama_cpp import LlamaCppModel
from irc.bench.llama_cpp_file import file_type, llama_cpp_file, write_llama
from irc.bench.models import random_llama
from irc.bench.precision import Precision, precision_named
from irc.bench.shapes import Shape
from irc.errors import InputError, IrcError

gguf = pytest.importorskip("gguf")

TINY = Shape(hidden=64, layers=2, ffn=96, heads=4, kv_heads=2, vocab=300)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return random_llama(TINY, tmp_path / "base", "fp32", 64, seed=3)


def needs_llama_cpp() -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: llama.cpp cannot be run")


def test_llama_cpp_predicts_the_same_tokens(llama: Path, tmp_path: Path) -> None:
    needs_llama_cpp()
    dense = LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():  # larger differences between logits than an untrained model has
        for name, weight in dense.named_parameters():
            if weight.ndim > 1:
                weight *= 4 if "norm" not in name else 1
    dense.save_pretrained(llama)
    write_llama(llama, tmp_path / "m.gguf", "F32")
    theirs = LlamaCppModel(tmp_path / "m.gguf", 64, threads=1)
    tokens = [(7 * i * i + 3) % TINY.vocab for i in range(20)]
    for step in range(8):
        answer = theirs.ask(tokens, cached=step > 0, logprobs=1)
        predicted = answer["choices"][0]["logprobs"]["content"][0]
        with torch.no_grad():
            logits = dense(torch.tensor([tokens])).logits[0, -1]
        assert predicted["id"] == int(logits.argmax())
        assert predicted["logprob"] == pytest.approx(float(logits.log_softmax(0).max()), abs=0.01)
        tokens.append(predicted["id"])


def test_a_step_reads_the_new_tokens_alone(llama: Path, tmp_path: Path) -> None:
    needs_llama_cpp()
    write_llama(llama, tmp_path / "m.gguf", "Q4_1")
    model = LlamaCppModel(tmp_path / "m.gguf", 64, threads=1)
    state = model.step(np.arange(12).reshape(1, 12), model.empty(1), None)
    assert model.step(np.array([[5]]), state, None) == [*range(12), 5]
    assert model.seconds > 0
    with pytest.raises(IrcError, match="new"):
        model.ask([200, 201, 202], cached=True)


def test_bench_times_llama_cpp(irc_main: Callable[..., Any]) -> None:
    needs_llama_cpp()
    sizes = "--hidden 64 --layers 1 --ffn 96 --heads 4 --kv-heads 2 --past 8 --decode 2 --rounds 1 --prefill 16".split()
    flags = "--sparsities 0.5 --ops portable --peers llama.cpp --provider cpu --dtype int4 --json".split()
    shown = irc_main("bench", *flags, *sizes)
    assert shown.code == 0, shown.err
    assert shown.json["not_timed"] == {}
    assert [row["phase"] for row in shown.json["results"]] == ["prefill", "decode"]
    for row in shown.json["results"]:
        assert row["contenders"]["llama.cpp"]["ms"] > 0
        assert "ideal" not in row["contenders"]["llama.cpp"]


def test_batches_and_a_missing_package_are_refused(
    irc_main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    shown = irc_main("bench", "--peers", "llama.cpp", "--provider", "cpu")
    assert shown.code == 2
    assert "pip install 'informed-routing-compiler[llamacpp]'" in shown.err
    assert "Traceback" not in shown.err


def test_batches_are_refused(irc_main: Callable[..., Any]) -> None:
    needs_llama_cpp()
    shown = irc_main("bench", "--peers", "llama.cpp", "--provider", "cpu", "--batch", "1,2")
    assert shown.code == 2
    assert "batch 1" in shown.err


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_file_of_the_wanted_type_is_used_itself(llama: Path, tmp_path: Path, dtype: str) -> None:
    write_llama(llama, tmp_path / "given.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "given.gguf")
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1} == {dtype}
    used = llama_cpp_file(llama, str(tmp_path / "given.gguf"), tmp_path, precision_named("int4", "cpu"))
    assert (used.name == "given.gguf") == (dtype == "Q4_1")


def test_types() -> None:
    names = {name: file_type(precision_named(name, "cpu")) for name in ("fp32", "fp16", "bf16", "int4", "int8")}
    assert names == {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int4": "Q4_1", "int8": "Q8_0"}


def test_what_llama_cpp_cannot_store_is_refused(tmp_path: Path) -> None:
    odd = random_llama(Shape(hidden=48, layers=1, ffn=96, heads=4, kv_heads=2, vocab=64), tmp_path / "b", "fp32", 8, 0)
    with pytest.raises(InputError, match="blocks of 32"):
        write_llama(odd, tmp_path / "m.gguf", "Q4_1")
    text = (odd / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "qwen2"')
    (odd / "config.json").write_text(text)
    with pytest.raises(InputError, match="model_type"):
        llama_cpp_file(odd, "demo", tmp_path, Precision("fp32", "fp32"))
