"""Bundles: atomic saves, equal logits after loading, generation with a cache, and errors."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import irc
from irc.bundle.contents import Bundle, bundle_of
from irc.bundle.layout import ADAPTER, CONFIG
from irc.bundle.saving import save_bundle
from irc.errors import InputError, IrcError
from irc.model.build import build_plain
from irc.model.routed import RoutedForCausalLM

Make = Callable[..., RoutedForCausalLM]


@pytest.fixture
def model(make_routed: Make, shake: Any) -> RoutedForCausalLM:
    result: RoutedForCausalLM = shake(make_routed())
    return result


@pytest.fixture
def bundle(model: RoutedForCausalLM, tmp_path: Path) -> Path:
    save_bundle(model, tmp_path / "bundle")
    return tmp_path / "bundle"


def logits(model: RoutedForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def greedy(model: RoutedForCausalLM, ids: torch.Tensor, mask: torch.Tensor, steps: int) -> torch.Tensor:
    """Extend by argmax, the whole text again for every token."""
    for _ in range(steps):
        chosen = logits(model, ids, mask)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
    return ids


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loaded(folder: Path) -> Bundle:
    """Return what a loaded model knows of its bundle."""
    found = bundle_of(irc.load(folder))
    assert found is not None
    return found


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def test_saved_and_loaded_gives_equal_logits(model: RoutedForCausalLM, bundle: Path, ids: torch.Tensor) -> None:
    loaded = irc.load(bundle)
    assert not loaded.training
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(logits(loaded, ids), logits(loaded, ids))  # no noise is left on
    with model.control.using(mode="execute"):
        assert not torch.allclose(logits(loaded, ids), logits(model, ids))


def test_lora_travels_with_the_bundle(
    model: RoutedForCausalLM, lora_on: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    save_bundle(lora_on(model), tmp_path / "b")
    assert torch.equal(logits(irc.load(tmp_path / "b"), ids), logits(model, ids))


def test_silu_forecasters_come_back(make_routed: Make, shake: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    model = shake(make_routed(3, "silu"))
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(irc.load(tmp_path / "b"), ids), logits(model, ids))


def test_a_bundle_is_small_and_holds_no_pickle(bundle: Path) -> None:
    files = files_of(bundle)
    assert set(files) == {CONFIG, ADAPTER, "recipe.yaml", "metrics.json", "README.md"}
    for name, content in files.items():
        assert not content.startswith((b"\x80", b"PK")), name


def test_generation_with_a_cache_equals_greedy_without(bundle: Path, ids: torch.Tensor) -> None:
    loaded = irc.load(bundle)
    found = loaded.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)
    uncached = loaded.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=False)
    expected = greedy(loaded, ids[:1], torch.ones_like(ids[:1]), 12)
    assert found.tolist() == uncached.tolist() == expected.tolist()


def test_batched_generation_with_left_padding_equals_each_alone(bundle: Path, ids: torch.Tensor) -> None:
    loaded = irc.load(bundle)
    lengths = (16, 9, 4)
    batch, mask = ids[:3].clone(), torch.ones_like(ids[:3])
    for row, length in enumerate(lengths):
        batch[row, : 16 - length], mask[row, : 16 - length] = 256, 0
    found = loaded.generate(batch, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, 16 - length :]
        assert found[row, 16:].tolist() == greedy(loaded, alone, torch.ones_like(alone), 8)[0, length:].tolist()


def test_cached_logits_equal_those_without_cache(bundle: Path, ids: torch.Tensor) -> None:
    loaded = irc.load(bundle)
    whole = logits(loaded, ids)
    with torch.no_grad():
        first = loaded(input_ids=ids[:, :9])
        second = loaded(input_ids=ids[:, 9:], past_key_values=first.past_key_values)
    # fp32 attention over 9 + 7 keys instead of 16: other summation order, logits of about 1
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-4)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda b: (b / CONFIG).unlink(), CONFIG),
    "no adapter": (lambda b: (b / ADAPTER).unlink(), ADAPTER),
    "truncated adapter": (lambda b: (b / ADAPTER).write_bytes((b / ADAPTER).read_bytes()[:-9]), ADAPTER),
    "changed adapter": (lambda b: (b / ADAPTER).write_bytes((b / ADAPTER).read_bytes()[:-1] + b"\x01"), ADAPTER),
    "changed hash": (lambda b: edit(b, lambda c: c.update(adapter_sha256="0" * 64)), ADAPTER),
    "newer format": (lambda b: edit(b, lambda c: c.update(format_version=2)), "format 2"),
    "no json": (lambda b: (b / CONFIG).write_text("{'a': 1"), CONFIG),
    "binary": (lambda b: (b / CONFIG).write_bytes(b"\xff\xfe\x00"), CONFIG),
    "a list": (lambda b: (b / CONFIG).write_text("[1]"), CONFIG),
    "no base": (lambda b: edit(b, lambda c: c.pop("base")), "base"),
    "base is text": (lambda b: edit(b, lambda c: c.update(base="x")), CONFIG),
    "no spec": (lambda b: edit(b, lambda c: c.pop("spec")), "spec"),
    "unknown spec key": (lambda b: edit(b, lambda c: c["spec"].update(odd=1)), "'odd'"),
    "rank is text": (lambda b: edit(b, lambda c: c["spec"].update(rank="four")), "rank"),
    "other rank": (lambda b: edit(b, lambda c: c["spec"].update(rank=5)), r"\[4, 32\].*\[5, 32\]|\[32, 4\].*\[32, 5\]"),
    "version is text": (lambda b: edit(b, lambda c: c.update(format_version="new")), "format_version.*'new'"),
    "version is none": (lambda b: edit(b, lambda c: c.update(format_version=0)), "format_version.* 0"),
    "no version": (lambda b: edit(b, lambda c: c.pop("format_version")), "'format_version'"),
    "much newer format": (
        lambda b: edit(b, lambda c: (c.clear(), c.update(format_version=7, unknown=[]))),
        "format 7",
    ),
    "wrong base": (lambda b: edit(b, lambda c: c["base"].update(sha256="0" * 64)), "0" * 12),
    "base has gone": (lambda b: edit(b, lambda c: c["base"].update(name="/nowhere/x")), "/nowhere/x"),
    "a share of 1e390": (lambda b: edit(b, lambda c: c["units"][0].update(keep_ratio=10**390)), "391 digits"),
    "a share that is no number": (lambda b: edit(b, lambda c: c["units"][0].update(keep_ratio=float("nan"))), "nan"),
    "a share of two": (lambda b: edit(b, lambda c: c["units"][0].update(keep_ratio=2)), " 2;"),
    "target is text": (lambda b: edit(b, lambda c: c.update(sparsity={"target": "x"})), "'x'"),
    "window is text": (lambda b: edit(b, lambda c: c.update(data={"seq_len": "abc"})), "seq_len.*'abc'"),
    "window of one": (lambda b: edit(b, lambda c: c.update(data={"seq_len": 1})), "seq_len.* 1"),
    "text is a number": (lambda b: edit(b, lambda c: c.update(data={"name": 3})), " 3;"),
    "unknown lora key": (lambda b: edit(b, lambda c: c.update(lora={"odd": 1})), "odd"),
    "lora has gone": (lambda b: edit(b, lambda c: c.update(lora={"rank": 2})), "lora"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_bundle_is_refused_in_one_sentence(bundle: Path, how: str, irc_main: Any, tmp_path: Path) -> None:
    damage, match = DAMAGE[how]
    damage(bundle)
    before = files_of(tmp_path)
    with pytest.raises(InputError, match=match) as caught:
        irc.load(bundle)
    assert "\n" not in str(caught.value)
    assert files_of(tmp_path) == before


def test_a_share_may_be_off_by_rounding(bundle: Path) -> None:
    edit(bundle, lambda c: c["units"][0].update(keep_ratio=1 + 1e-12, calibration_keep=-1e-17))
    edit(bundle, lambda c: c.update(sparsity={"target": 0.25, "realized": -2e-16}))
    assert max(unit.keep_ratio or 0 for unit in loaded(bundle).config.measured.units.values()) > 1


def test_changed_lora_weights_are_refused(model: RoutedForCausalLM, lora_on: Any, tmp_path: Path) -> None:
    save_bundle(lora_on(model), tmp_path / "b")
    path = tmp_path / "b" / "lora" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=re.escape(str(path))):
        irc.load(tmp_path / "b")


def test_a_base_that_moved_is_named_by_hand(
    bundle: Path, model_folder: Path, tmp_path: Path, ids: torch.Tensor
) -> None:
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    edit(bundle, lambda c: c["base"].update(name=str(tmp_path / "gone")))
    assert logits(irc.load(bundle, base=str(moved)), ids).shape == (4, 16, 257)
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(InputError, match=str(moved)):
        irc.load(bundle, base=str(moved))


def no_space(*arguments: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "failing", ["irc.files.tensors.save_file", "irc.bundle.saving._write", "os.fsync", "os.replace"]
)
def test_a_failing_save_leaves_the_old_bundle_whole(
    model: RoutedForCausalLM, bundle: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(bundle)
    with torch.no_grad():
        next(iter(model.adapter_parameters("router").values())).add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(failing, no_space)
        with pytest.raises(IrcError, match="No space left") as caught:
            save_bundle(model, bundle)
        assert caught.value.exit_code == 1
    assert files_of(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    save_bundle(model, bundle)
    assert files_of(bundle) != before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_swap_that_fails_half_way_puts_the_old_bundle_back(
    model: RoutedForCausalLM, bundle: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, replace = files_of(bundle), os.replace

    def second_fails(source: Any, target: Any) -> None:
        if Path(source).name.endswith(".new"):
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises((IrcError, KeyboardInterrupt)):
        save_bundle(model, bundle)
    assert files_of(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_plain_model_has_nothing_to_save(base: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        save_bundle(build_plain(base), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_bundle_lost_between_two_renames_is_named(bundle: Path) -> None:
    aside = bundle.with_name(f".{bundle.name}.x1.old")
    aside.mkdir()
    os.replace(bundle, aside / bundle.name)
    with pytest.raises(InputError, match=re.escape(str(aside / bundle.name))):
        irc.load(bundle)
