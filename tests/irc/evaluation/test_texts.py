"""The yardstick and the user's further texts: how they are read, measured, shown and held against limits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from irc.bundle.saving import save_bundle
from irc.errors import GateMissed, InputError
from irc.evaluation.fidelity import fidelity_of
from irc.evaluation.figures import check_limits, worst_text
from irc.evaluation.texts import further_texts
from irc.model.checkpoint import BaseModel, find_base

NAMES = ["prose", "long prose", "code", "technical", "dialogue"]
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"


def test_the_percentile_is_a_value_and_its_interval_holds_it() -> None:
    values = torch.arange(1000.0)
    found = fidelity_of(values, values < 250)
    assert (found.kl, found.kl_p99, found.top1) == (499.5, 989.0, 0.25)
    assert found.kl_p99_interval[0] < 989 <= found.kl_p99_interval[1] <= 999
    assert fidelity_of(values, values < 250) == found
    assert fidelity_of(values[:5], values[:5] < 5).kl_p99 == 4


def test_the_yardstick_is_read_in_windows(base: BaseModel) -> None:
    texts = further_texts(base, 16, 512)
    assert [text.name for text in texts] == NAMES
    for text in texts:
        assert text.windows.shape == ((1, 64) if text.name == "long prose" else (32, 16))
    prose, long = texts[0].windows, texts[1].windows
    assert torch.equal(long[0, :16], prose[0])  # it begins where prose begins
    assert further_texts(base, 16, 0) == []


def test_a_model_without_room_for_a_long_text_has_none(base: BaseModel) -> None:
    assert "long prose" not in [text.name for text in further_texts(base, 64, 512)]


def test_dialogues_are_seen_through_the_chat_template(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    shown = []
    for model in (find_base(str(folder)), find_base(str(model_folder))):
        shown.append(model.tokenizer.decode(further_texts(model, 64, 4096)[-1].windows[0]))
    assert "<|user|>" in shown[0]
    assert "User: " in shown[1]


def test_texts_of_the_user_come_first(base: BaseModel, text_file: Path) -> None:
    mine, *others = further_texts(base, 16, 64, [f"mine={text_file}"])
    assert mine.name == "mine"
    assert mine.windows.shape == (4, 16)
    assert [text.name for text in others] == NAMES


@pytest.mark.parametrize("given", ["mine", "=x.txt", "mine=", "mine=nowhere.txt", "mine={short}"])
def test_a_text_that_cannot_be_read(base: BaseModel, tmp_path: Path, given: str) -> None:
    (tmp_path / "short.txt").write_text("short")
    given = given.replace("{short}", str(tmp_path / "short.txt"))
    with pytest.raises(InputError, match=given.partition("=")[2].rpartition("/")[2] or "mine"):
        further_texts(base, 16, 64, [given])


def text(name: str, kl: float, top1: float) -> dict[str, Any]:
    return {"name": name, "fidelity": {"kl": kl, "top1": top1}}


def test_limits_hold_for_every_text() -> None:
    metrics = {"data": {"name": "main"}, "fidelity": {"kl": 0.1, "top1": 0.8}, "texts": [text("code", 0.3, 0.9)]}
    assert worst_text([text("a", 0.1, 0.9), text("b", 0.3, 0.95)]) == "b"
    check_limits(metrics, {"kl": 0.3, "top1": 0.8})
    check_limits(metrics, {})
    with pytest.raises(GateMissed, match=r"0\.300 on code"):
        check_limits(metrics, {"kl": 0.2})
    with pytest.raises(GateMissed, match=r"0\.800 of main"):
        check_limits(metrics, {"top1": 0.85})


def test_a_conversion_reports_every_text_and_a_missed_limit_keeps_the_bundle(
    irc_main: Any, convert_arguments: Callable[..., list[str]], text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "b"
    arguments = convert_arguments(output, yardstick_tokens=64)
    done = irc_main(*arguments, "--also", f"mine={text_file}", "--require", "kl=0")
    assert done.code == 3, done.err
    assert "KL" in done.sentence()
    metrics = done.json
    assert [one["name"] for one in metrics["texts"]] == ["mine", *NAMES]
    assert json.loads((output / "metrics.json").read_text())["fidelity"] == metrics["fidelity"]
    for one in metrics["texts"]:
        assert one["fidelity"]["kl"] > 0
        assert 0 < one["flops_ratio"] < 1.5
    shown = irc_main("inspect", output)
    assert f"{metrics['fidelity']['kl']:.3f} nats" in shown.out
    shown = irc_main("eval", output, "--yardstick-tokens", "32")
    assert shown.code == 0, shown.err
    for name in NAMES:
        assert name in shown.out
    assert "(worst)" in shown.out


@pytest.mark.parametrize("limit", ["kl", "kl=", "kl=x", "kl=-1", "kl=nan", "ppl=2", "=1"])
def test_a_limit_that_is_none(irc_main: Any, tmp_path: Path, limit: str) -> None:
    refused = irc_main("convert", "demo", "-o", tmp_path / "b", "--require", limit)
    assert (refused.code, limit in refused.sentence()) == (2, True)


def test_a_plain_model_has_perplexities_alone(irc_main: Any, model_folder: Path, text_file: Path) -> None:
    done = irc_main("eval", model_folder, "--data", text_file, "--seq-len", "16", "--yardstick-tokens", "64", "--json")
    assert done.code == 0, done.err
    assert [set(one) for one in done.json["texts"]] == 5 * [{"name", "tokens", "perplexity"}]


def test_a_ratio_under_1_is_called_adaptation(
    irc_main: Any, make_routed: Any, shake: Any, text_file: Path, tmp_path: Path
) -> None:
    save_bundle(shake(make_routed()), tmp_path / "b")
    done = irc_main("eval", tmp_path / "b", "--data", text_file, "--seq-len", "16", "--yardstick-tokens", "64")
    assert done.code == 0, done.err
    assert ("adapted" in done.out) == (" *" in done.out)
