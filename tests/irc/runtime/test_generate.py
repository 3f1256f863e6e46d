"""`irc generate`: the texts it writes, how they end, and the prompts it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import irc
from irc.errors import InputError
from irc.runtime import generation
from irc.runtime.generation import Generator, Sampling
from irc.runtime.provider import choose_provider
from irc.runtime.session import Runtime

PROMPT = "def parse(text):\n    "


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


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_a_step_of_nothing_is_refused(exported: Path, shape: tuple[int, int]) -> None:
    runtime = Runtime(exported)
    nothing = np.zeros(shape, np.int64)
    with pytest.raises(InputError, match=r"a step needs a sequence and a token at least"):
        runtime.step(nothing, nothing, runtime.empty_cache(len(nothing)))


def test_ids_are_continued_up_to_the_context_and_no_further(exported: Path) -> None:
    """As prompts are, which `irc generate` refuses where they leave room for nothing."""
    generator = Generator(Runtime(exported))
    generator.end = frozenset()
    assert len(generator.continue_ids([1] * 60, 50)) == 4
    assert len(generator.continue_ids([1] * 60, 3)) == 3
    for ids, sentence in (([1] * 64, "64 tokens, the model's context is 64"), ([], "no token"), ([1, 257], "hold 257")):
        with pytest.raises(InputError, match=sentence):
            generator.continue_ids(ids, 3)


def test_an_interrupt_ends_the_text_cleanly(exported: Path) -> None:
    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    result = Generator(Runtime(exported)).generate(PROMPT, emit=interrupt)
    assert result.stopped == "interrupted"
    assert len(result.tokens) == 1


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
    "flags",
    [("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "1.5"), ("--top-k", "-1"), ("--seed", "-1"), ("-n", "0")],
)
def test_sampling_out_of_range_is_refused(exported: Path, flags: tuple[str, str], irc_main: Callable[..., Any]) -> None:
    assert irc_main("generate", exported, PROMPT, *flags).code == 2


def test_a_negative_seed_is_refused(exported: Path) -> None:
    """Greedily too, as Triton's clients may ask for it."""
    generator = Generator(Runtime(exported))
    with pytest.raises(InputError, match="seed is -1; give 0 or more"):
        generator.generate(PROMPT, max_tokens=1, sampling=Sampling(seed=-1))


def test_cuda_that_does_not_load_is_an_error(exported: Path, irc_main: Callable[..., Any]) -> None:
    if choose_provider("auto") == "cuda":
        pytest.skip("CUDA loads here")
    shown = irc_main("generate", exported, PROMPT, "--provider", "cuda")
    assert shown.code == 2
    assert "provider is 'cuda', but" in shown.sentence()


def test_a_data_type_that_the_provider_cannot_run(bundle: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    assert irc_main("export", bundle, "-o", tmp_path / "bf16", "--dtype", "bf16").code == 0
    shown = irc_main("generate", tmp_path / "bf16", PROMPT, "--provider", "cpu")
    assert shown.code == 2
    assert "CPU provider cannot run bf16" in shown.sentence()


@pytest.mark.parametrize("stop", [["<|stop|>"], ["z", "<|stop|>"]])
def test_a_special_token_that_is_a_stop_string_ends_the_text(
    exported: Path, monkeypatch: pytest.MonkeyPatch, stop: list[str]
) -> None:
    """A decoded text does not contain special tokens."""
    generator = Generator(Runtime(exported))
    special = generator.tokenizer._tokenizer.add_special_tokens(["<|stop|>"]) + 256
    chosen = iter([104, 105, special, 106, 107])
    monkeypatch.setattr(generation, "choose", lambda *arguments: next(chosen))
    result = generator.generate("a", max_tokens=5, stop=stop)
    text = generator.tokenizer.decode([104, 105])
    assert (result.stopped, result.tokens, result.text) == ("stop", [104, 105], text)


@pytest.mark.parametrize(("prompt", "warnings"), [("<|end|>a", 1), ("a<|end|><|end|>", 0), ("a", 0)])
def test_a_first_token_that_is_there_twice_is_told(
    exported: Path, caplog: pytest.LogCaptureFixture, prompt: str, warnings: int
) -> None:
    generator = Generator(Runtime(exported))
    generator.tokenizer.bos_token_id = 256
    generator.tokenizer._tokenizer.post_processor = TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 256)])
    generator.generate(prompt, max_tokens=1)
    assert len(caplog.records) == warnings


def test_a_stop_string_that_is_no_text_is_refused(exported: Path, irc_main: Callable[..., Any]) -> None:
    done = irc_main("generate", exported, PROMPT, "-n", "2", "--stop", "\udce9")
    assert done.code == 2
    assert r"'\udce9'" in done.sentence()


def test_settings_that_would_change_the_tokens_are_told(copied: Path, irc_main: Any) -> None:
    path = copied / "generation_config.json"
    stated = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(stated | {"repetition_penalty": 5.0, "num_beams": 1}))
    done = irc_main("generate", copied, "the", "--max-tokens", "2")
    assert done.code == 0
    assert "repetition_penalty 5.0" in done.err
    assert "num_beams" not in done.err
