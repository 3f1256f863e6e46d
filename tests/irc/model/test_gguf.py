"""GGUF files are opened as transformers opens them, once, and others are refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import irc
from irc.deployment.onnx_folder import relative_source
from irc.errors import InputError
from irc.files.atomic import file_sha256
from irc.model import gguf
from irc.model.checkpoint import find_base

pytest.importorskip("gguf")
from tests.irc.gguf_files import SHAPE, TOKENS, llama3_factors, tiny_llama, write_gguf

TEXT = "the 12 cats, the  345 hats<|im_end|>\n\tdef f(x):"
MIXED = ("F32", "F16", "Q8_0", "Q4_0")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "irc" / "gguf"


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.2
    return model


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Give `write(name, **what)`: a tiny Llama as GGUF."""

    def make(name: str = "tiny.gguf", **what: Any) -> Path:
        return write_gguf(tmp_path / name, random_model(tiny_llama()), **what)

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(12)[None] * 17 % len(TOKENS)).logits
    return found


def test_mixed_types_as_transformers_reads_them(write: Callable[..., Path]) -> None:
    path = write(types=MIXED)
    base = find_base(str(path))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(base.folder)), logits(theirs))
    assert base.name == str(path)
    assert base.sha256() == file_sha256(path)
    assert base.config.tie_word_embeddings
    assert base.dtype("auto") == torch.float32
    base.check_sizes(base.weights())
    base.check_finite()


def test_tokenizer_as_transformers_reads_it(write: Callable[..., Path]) -> None:
    path = write()
    ours, theirs = find_base(str(path)).tokenizer, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    chat = [{"role": "user", "content": TEXT}]
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids
    assert ours.decode(ours(TEXT).input_ids) == TEXT
    rendered = ours.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered.endswith("<|im_start|>assistant\n")
    special = (ours.bos_token, ours.eos_token, ours.pad_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|end|>")


def test_special_tokens_end_generation(write: Callable[..., Path]) -> None:
    base = find_base(str(write(values={"tokenizer.ggml.eot_token_id": TOKENS.index("<|end|>")})))
    ids = [TOKENS.index(token) for token in ("<|im_start|>", "<|im_end|>", "<|end|>")]
    assert (base.config.bos_token_id, base.config.eos_token_id, base.config.pad_token_id) == tuple(ids)
    assert base.generation.eos_token_id == ids[1:]
    assert base.generation.pad_token_id == ids[2]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", "x Ġ Ġ123"),
        ("smollm", "x ĠĠ 1 2 3"),
        ("llama-bpe", "x Ġ Ġ 123"),
        ("qwen2", "x Ġ Ġ 1 2 3"),
        ("tekken", "x Ġ Ġ 1 2 3"),
    ],
)
def test_words_are_cut_as_llama_cpp_cuts_them(write: Callable[..., Path], pre: str, words: str) -> None:
    tokenizer = find_base(
        str(write(values={"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": None}))
    ).tokenizer
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x  123")
    assert [word for word, _ in cut] == words.split(" ")
    begins = tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert begins == (pre in ("llama-bpe", "tekken"))


def test_a_sentencepiece_vocabulary(write: Callable[..., Path]) -> None:
    tokens = ["<unk>", "<s>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz", "▁t", "he", "▁the", "▁a"]
    tokens += [f"<{i}>" for i in range(len(TOKENS) - len(tokens))]
    kinds = [2, 3, 3] + [1] * (len(tokens) - 3)
    path = write(
        values={
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": None,
            "tokenizer.ggml.merges": None,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.add_bos_token": True,
            **{f"tokenizer.ggml.{key}_token_id": i for i, key in enumerate(("unknown", "bos", "eos"))},
            "tokenizer.ggml.padding_token_id": None,
        }
    )
    ours, theirs = find_base(str(path)).tokenizer, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = ours("the cat</s> a hat").input_ids
    assert [tokens[index] for index in ids][:2] == ["<s>", "▁the"]
    assert ids[1:] == [index for index in theirs("the cat</s> a hat").input_ids if index != 1]
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        **SHAPE,
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen2": lambda: Qwen2Config(**SHAPE, rope_theta=1e6, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, rope_theta=1e6, head_dim=16),
    "phi3": lambda: Phi3Config(**SHAPE, sliding_window=5, rms_norm_eps=1e-5),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE | {"num_hidden_layers": 6}, head_dim=16, sliding_window=5),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_architecture_computes_what_it_did(kind: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[kind]())
    factors = {"rope_freqs.weight": llama3_factors(model.config)} if kind == "llama" else None
    base = find_base(str(write_gguf(tmp_path / "x.gguf", model, kind, tensors=factors)))
    again = AutoModelForCausalLM.from_pretrained(base.folder, config=base.config)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(again.named_buffers()), dict(model.named_buffers()))  # frequencies of positions


def test_a_second_open_reads_the_cache(
    write: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    first = find_base(str(path))
    monkeypatch.setattr(gguf, "_read", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert find_base(str(path)) == first
    alone = path.parent / "alone"
    alone.mkdir()
    shutil.copy(path, alone)
    assert find_base(str(alone)).folder == first.folder == cache / file_sha256(path)


def test_large_models_are_written_as_bf16(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(types=MIXED)
    exact = load_file(find_base(str(path)).folder / "model.safetensors")
    shutil.rmtree(find_base(str(path)).folder)
    monkeypatch.setattr(gguf, "_LARGE_MODEL_BYTES", 1000)
    monkeypatch.setattr(gguf, "_PIECE", 100)  # several pieces, the last one smaller
    base = find_base(str(path))
    rounded = load_file(base.folder / "model.safetensors")
    assert base.config.dtype == torch.bfloat16
    assert {name: weight.bfloat16().tolist() for name, weight in exact.items()} == {
        name: weight.tolist() for name, weight in rounded.items()
    }


@pytest.mark.slow
def test_a_bundle_made_from_it_loads_again(
    write: Callable[..., Path],
    convert_arguments: Callable[..., list[str]],
    irc_main: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(types=MIXED)
    first, _, *others = convert_arguments(tmp_path / "bundle")
    outcome = irc_main(first, path, *others)
    assert outcome.code == 0, outcome.err
    model = irc.load(tmp_path / "bundle")
    assert (model.base.name, model.base.sha256()) == (str(path.resolve()), file_sha256(path))
    monkeypatch.chdir(tmp_path)
    assert relative_source(path.name, tmp_path / "onnx") == f"../{path.name}"  # a path, not a hub id


def renamed(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


def overwritten(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def replaced(path: Path, old: bytes, new: bytes) -> Path:
    return overwritten(path, path.read_bytes().replace(old, new))


WIDE = np.zeros((4, 32), np.float32)
MORE = {"blk.0.ffn_gate_exps.weight": WIDE}
REFUSED: dict[str, tuple[Callable[[Callable[..., Path]], Path], str]] = {
    "part": (lambda write: renamed(write(), "x-00001-of-00003.gguf"), "llama-gguf-split --merge"),
    "architecture": (lambda write: replaced(write(), b"llama", b"mamba"), "'mamba'.*llama, qwen2"),
    "type": (lambda write: write(types=("F64",)), "F64"),
    "no tokenizer": (lambda write: write(values={"tokenizer.ggml.tokens": None}), "tokenizer"),
    "kind of tokenizer": (lambda write: write(values={"tokenizer.ggml.model": "bert"}), "'bert'"),
    "cut": (lambda write: write(values={"tokenizer.ggml.pre": "poro-chat"}), "'poro-chat'"),
    "pointer": (
        lambda write: overwritten(write(), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "no GGUF": (lambda write: overwritten(write(), b"PK\x03\x04" * 100), "not a GGUF"),
    "empty": (lambda write: overwritten(write(), b""), "not a GGUF"),
    "missing": (lambda write: write().with_name("other.gguf"), "No such file"),
    "several": (lambda write: [write("a.gguf"), write("b.gguf")][0].parent, r"a\.gguf, b\.gguf"),
    "more weights": (lambda write: write(tensors=MORE), r"blk\.0\.ffn_gate_exps\.weight"),
    "fewer weights": (lambda write: write(tensors={"blk.1.ffn_up.weight": None}), "up_proj"),
    "shape": (lambda write: write(tensors={"blk.1.ffn_up.weight": WIDE}), r"ffn_up.*\[4, 32\].*\[64, 32\]"),
    "layers": (lambda write: write(values={"llama.block_count": 1_000_000}), "1000000 layers"),
    "positions": (lambda write: write(values={"llama.rope.scaling.type": "yarn"}), "yarn"),
    "partly rotated": (
        lambda write: write(values={"llama.rope.dimension_count": 4, "llama.attention.key_length": 8}),
        "rotates 4 of",
    ),
    "frequencies": (
        lambda write: write(tensors={"rope_freqs.weight": np.array([1, 3, 5, 2], np.float32)}),
        r"rope_freqs\.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused(case: str, write: Callable[..., Path], cache: Path, irc_main: Callable[..., Any]) -> None:
    make, what = REFUSED[case]
    path = make(write)
    with pytest.raises(InputError, match=f"(?s){path}.*{what}"):
        find_base(str(path))
    outcome = irc_main("inspect", path)
    assert outcome.code == 2
    assert str(path) in outcome.sentence()
    assert not cache.exists()


def test_a_truncated_file_is_refused(write: Callable[..., Path], cache: Path) -> None:
    whole = write(types=MIXED)
    content = whole.read_bytes()
    for index in range(12):
        path = overwritten(whole, content[: 4 + (len(content) - 5) * index // 11])
        with pytest.raises(InputError, match=str(path)):
            find_base(str(path))
    assert not cache.exists()


def test_without_the_package(write: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'informed-routing-compiler\[gguf\]'"):
        find_base(str(path))
    assert not cache.exists()
