from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from irc.errors import InputError
from irc.model.checkpoint import BaseModel
from irc.model.own_text import _prompts, own_text, own_text_file
from irc.text.source import SPLITS, load_text
from tests.irc.conftest import Bars, byte_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "irc" / "own-text"


def test_it_is_sampled_once_and_then_read_from_the_cache(base: BaseModel, cache: Path) -> None:
    bars = Bars()
    first = own_text(base, 1500, 0, bars)
    again = own_text(base, 1500, 0, bars)
    assert again == first
    assert bars.names() == ["own text"]
    assert len(list(cache.iterdir())) == 1


def test_the_same_seed_gives_the_same_text(base: BaseModel, tmp_path: Path) -> None:
    first, same, other = (
        own_text(base, 1500, seed, Bars(), cache=tmp_path / str(index)) for index, seed in enumerate((0, 0, 1))
    )
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()


def test_it_has_enough_tokens_in_every_split(base: BaseModel) -> None:
    text = own_text(base, 1500, 0, Bars())
    ids = [base.tokenizer(document.text, add_special_tokens=False)["input_ids"] for document in text.documents]
    assert sum(map(len, ids)) >= 1500
    assert all(text.split(split) for split in SPLITS)
    assert sorted(one.name for split in SPLITS for one in text.split(split)) == sorted(
        one.name for one in text.documents
    )


def test_every_split_has_answers_and_continuations_alike(base: BaseModel, cache: Path) -> None:
    """The model writes them by turns, an instruction first."""
    cache.mkdir(parents=True)
    own_text_file(base, 1500, 0).write_text(json.dumps(["answer", "continuation"] * 60))
    text = own_text(base, 1500, 0, Bars())
    for split, count in zip(SPLITS, (80, 16, 8, 16), strict=True):
        found = [document.text for document in text.split(split)]
        assert found.count("answer") == found.count("continuation") == count // 2, split


def test_prompts_are_beginnings_and_instructions_for_a_model_with_a_template() -> None:
    tokenizer: Any = byte_tokenizer()
    prompts = _prompts(tokenizer, random.Random(0))
    plain = [tokenizer.decode(next(prompts)) for _ in range(40)]
    assert not any("assistant" in prompt for prompt in plain)
    assert len(set(plain)) > 15
    tokenizer.chat_template = TEMPLATE
    prompts = _prompts(tokenizer, random.Random(0))
    mixed = [tokenizer.decode(next(prompts)) for _ in range(40)]
    asked = [prompt for prompt in mixed if prompt.startswith("[user] ") and prompt.endswith("[assistant]")]
    assert len(asked) == 20
    assert not any("{}" in prompt for prompt in asked)


def test_a_conversion_mixes_it_with_another_text(
    irc_main: Callable[..., Any], convert_arguments: Callable[..., list[str]], tmp_path: Path, cache: Path
) -> None:
    arguments = [*convert_arguments(tmp_path / "b", self_tokens=4000), "--data", "self", "--data-weights", "2,1"]
    made = irc_main(*arguments)
    assert made.code == 0, made.err
    assert made.json["data"]["name"].endswith("text.txt + self")
    measured = irc_main("eval", tmp_path / "b", "--device", "cpu", "--json")
    assert measured.json["perplexity"] == pytest.approx(made.json["perplexity"])
    own = irc_main("eval", tmp_path / "b", "--device", "cpu", "--data", "self", "--json").json["data"]
    assert (own["name"], own["split"]) == ("self", "heldout")
    assert len(list(cache.iterdir())) == 1


def test_a_conversion_without_a_text_reads_it_and_source_code(
    irc_main: Callable[..., Any], convert_arguments: Callable[..., list[str]], tmp_path: Path, cache: Path
) -> None:
    arguments = convert_arguments(tmp_path / "b", self_tokens=4000, eval_tokens=256)
    index = arguments.index("--data")
    made = irc_main(*arguments[:index], *arguments[index + 2 :])
    assert made.code == 0, made.err
    assert made.json["data"]["name"] == "self + stdlib"
    measured = irc_main("eval", tmp_path / "b", "--device", "cpu", "--json").json
    assert measured["data"] == made.json["data"]
    assert measured["perplexity"] == pytest.approx(made.json["perplexity"])


def test_nothing_is_sampled_for_what_is_refused(
    irc_main: Callable[..., Any], convert_arguments: Callable[..., list[str]], tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial/recipe.yaml").write_text("{}")
    own = ("--data", "self")
    for output, flags, said in (
        ("b", own, "holds an unfinished conversion"),
        ("c", (*own, "--data", "nowhere.txt"), "nowhere.txt"),
        ("c", (*own, "--also", "mail=nowhere.txt"), "nowhere.txt"),
        ("c", (*own, "--set", "self_tokens=100"), "in the calibration split, but a window has 16; give at least 120"),
        ("c", (*own, "--set", "self_tokens=100", "--dry-run"), "give at least 120"),
    ):
        shown = irc_main(*convert_arguments(tmp_path / output), *flags)
        assert (shown.code, said in shown.sentence()) == (2, True), shown.err
    assert not cache.exists()


def test_splits_are_part_of_the_fingerprint(base: BaseModel) -> None:
    text = own_text(base, 1500, 0, Bars())
    assert text.fingerprint() != replace(text, turns=text.turns[::-1]).fingerprint()


def test_commands_without_a_model_say_that_they_do_not_read_it() -> None:
    with pytest.raises(InputError, match="self: is the model's own text, which irc convert"):
        load_text("self")
