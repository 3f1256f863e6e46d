"""The key/value policy `reduced`: which units it affects, what it saves, and how it is stored, swept and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import irc
from irc.bundle.key_policy import calibrated_keep, kv_saved, set_key_policy
from irc.bundle.saving import save_bundle
from irc.errors import InputError
from irc.evaluation.kv_sweep import kv_sweep
from irc.evaluation.perplexity import evaluate_routed
from irc.model.build import build_plain
from irc.model.flops import unit_flops
from irc.model.routed import RoutedForCausalLM
from irc.recipe.key_policy import KeyPolicy

FIRST, SECOND = "model.layers.0.self_attn", "model.layers.1.self_attn"
KEEP = {FIRST: 0.25, "model.layers.0.mlp": 0.0, SECOND: 0.6, "model.layers.1.mlp": 1.0}


@pytest.fixture
def model(make_routed: Callable[..., RoutedForCausalLM], shake: Callable[..., Any]) -> RoutedForCausalLM:
    result: RoutedForCausalLM = shake(make_routed())
    return result


@pytest.fixture
def bundle(model: RoutedForCausalLM, tmp_path: Path) -> Path:
    """A bundle of the model that says what its units skip, as a conversion leaves it."""
    save_bundle(model, tmp_path / "bundle", {"calibration_keep": KEEP})
    return tmp_path / "bundle"


@pytest.mark.parametrize(
    ("policy", "reduced"),
    [
        (KeyPolicy(), set()),
        (KeyPolicy("reduced", 0.0), {FIRST, SECOND}),
        (KeyPolicy("reduced", 0.4), {FIRST, SECOND}),
        (KeyPolicy("reduced", 0.41), {FIRST}),
        (KeyPolicy("reduced", 0.75), {FIRST}),
        (KeyPolicy("reduced", 1.0), set()),
    ],
)
def test_strongly_skipping_attention_units_are_reduced(
    model: RoutedForCausalLM, policy: KeyPolicy, reduced: set[str]
) -> None:
    set_key_policy(model, policy, KEEP)
    assert model.control.reduced == reduced
    assert kv_saved(model, KEEP) == pytest.approx(sum(1 - KEEP[name] for name in reduced) / 2)


def test_keys_and_values_of_reduced_units_cost_executed_tokens_only(model: RoutedForCausalLM) -> None:
    full = unit_flops(model, 31)[FIRST]
    set_key_policy(model, KeyPolicy("reduced", 0.5), KEEP)
    reduced = unit_flops(model, 31)[FIRST]
    keys_and_values, scores = 2 * 2 * 32 * 16, 4 * 16 * 32
    assert (reduced.always, reduced.scores) == (keys_and_values, scores)
    saved = 0.75 * keys_and_values + 0.25 * 0.75 * scores
    assert full.routed(0.25) - reduced.routed(0.25) == pytest.approx(saved)
    assert full.dense == reduced.dense


@torch.no_grad()
def test_generation_and_padding_follow_the_policy(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    """Greedy tokens with a cache are those of whole texts without one; left padding changes nothing."""
    before = model(input_ids=ids).logits
    set_key_policy(model, KeyPolicy("reduced", 0.0), KEEP)
    assert (model(input_ids=ids).logits - before).abs().max() > 1e-3
    prompt = ids[:1, :6]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    text = prompt
    while text.shape[1] < generated.shape[1]:
        text = torch.cat((text, model(input_ids=text).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, text)
    padding = torch.zeros(1, 3, dtype=torch.int64)
    padded, mask = torch.cat((padding, prompt), 1), torch.cat((padding, torch.ones_like(prompt)), 1)
    logits = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(logits, model(input_ids=prompt).logits, rtol=0, atol=1e-5)


def test_a_bundle_keeps_its_policy(bundle: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    model = irc.load(bundle)
    assert calibrated_keep(model) == KEEP
    set_key_policy(model, KeyPolicy("reduced", 0.7), KEEP)
    save_bundle(model, tmp_path / "again", json.loads((bundle / "metrics.json").read_text()))
    again = irc.load(tmp_path / "again")
    assert again.control.reduced == {FIRST}
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_sweep_trades_memory_against_perplexity(bundle: Path, ids: torch.Tensor, bars: Any) -> None:
    model, progress = irc.load(bundle), bars()
    rows = kv_sweep(model, ids, [0.0, 0.5, 0.7, 1.0], progress)
    assert [row["reduced_units"] for row in rows] == [2, 1, 1, 0]
    assert len(progress.made) == 3  # 0.5 and 0.7 reduce the same unit
    saved = [row["saved"] for row in rows]
    assert saved[0] > saved[1] == saved[2] > saved[3] == 0
    assert not model.control.reduced
    with progress("again", len(ids)) as bar:
        assert rows[3]["perplexity"] == evaluate_routed(model, ids, bar)[0]
    set_key_policy(model, KeyPolicy("reduced", 0.5), KEEP)
    with progress("again", len(ids)) as bar:
        assert rows[1]["perplexity"] == evaluate_routed(model, ids, bar)[0]


def test_the_command_shows_table_and_plot(bundle: Path, text_file: Path, irc_main: Callable[..., Any]) -> None:
    arguments = ["eval", bundle, "--data", text_file, "--tokens", "256", "--seq-len", "16", "--kv-sweep", "0.5,1"]
    result = irc_main(*arguments, "--json").json
    assert [row["threshold"] for row in result["kv_sweep"]] == [0.5, 1]
    assert result["kv"] == {"policy": "full", "threshold": None, "reduced_units": 0, "saved": 0}
    shown = irc_main(*arguments, "--kv-threshold", "0.7")
    assert shown.code == 0, shown.err
    assert "keys and values saved" in shown.out
    assert "(1 attention units, threshold 0.7)" in shown.out
    plot = shown.out[shown.out.index("perplexity over memory saved") :]
    assert plot.count("*") == 2
    assert "share of keys and values saved" in plot


def test_what_has_no_policy_is_refused(
    model: RoutedForCausalLM, bundle: Path, model_folder: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    silent = tmp_path / "silent"
    save_bundle(model, silent)
    assert str(silent) in irc_main("eval", silent, "--kv-sweep", "0.5").sentence()
    assert str(model_folder) in irc_main("eval", model_folder, "--kv-policy", "reduced").sentence()
    assert irc_main("eval", bundle, "--kv-sweep", "0.5,2").code == 2
    assert irc_main("eval", bundle, "--kv-threshold", "-1").code == 2
    with pytest.raises(InputError, match="plain model"):
        calibrated_keep(build_plain(model.base))
    config = json.loads((bundle / "irc_config.json").read_text())
    (bundle / "irc_config.json").write_text(json.dumps(config | {"kv_policy": "half"}))
    assert "'half'" in irc_main("eval", bundle).sentence()


def test_a_conversion_says_what_the_policy_saves(
    convert_arguments: Callable[..., list[str]], tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    made = irc_main(*convert_arguments(tmp_path / "bundle", kv_policy="reduced", kv_threshold=0.0, sparsity=0.5))
    assert made.code == 0, made.err
    result = made.json
    assert (result["kv"]["policy"], result["kv"]["reduced_units"]) == ("reduced", 2)
    attention = [unit["keep_ratio"] for name, unit in result["units"].items() if name.endswith("attn")]
    assert result["kv"]["saved"] == pytest.approx(1 - sum(attention) / 2)
    assert all(0 <= share <= 1 for share in result["calibration_keep"].values())
    assert irc.load(tmp_path / "bundle").control.reduced == {FIRST, SECOND}
    refused = irc_main(*convert_arguments(tmp_path / "other", kv_policy="half"))
    assert "'half'" in refused.sentence()
