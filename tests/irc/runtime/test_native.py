"""The runtime on native kernels: the same model, chosen and named by --ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from irc.errors import InputError
from irc.runtime import native
from irc.runtime.cache import Cache
from irc.runtime.session import Runtime

PROMPT = "def parse(text):\n    "
needs_library = pytest.mark.skipif(
    native.installed_library() is None, reason="the native operator library is not installed"
)


@needs_library
def test_steps_equal_those_of_the_portable_bodies(exported: Path) -> None:
    """A padded prefill and steps of one token: logits, routes and caches within 1e-5."""
    runtimes = {ops: Runtime(exported, "cpu", ops=ops) for ops in ("native", "portable")}
    assert [runtime.ops for runtime in runtimes.values()] == ["native", "portable"]
    assert runtimes["native"].in_place
    caches = {ops: runtime.empty_cache(2) for ops, runtime in runtimes.items()}
    past = 0
    for tokens in (6, 1, 1, 80, 60, 1):  # places are reserved for 128 tokens first, then for 192
        ids = np.arange(2 * tokens).reshape(2, tokens) % 61
        mask = np.ones((2, past + tokens), np.int64)
        mask[0, :2] = 0
        steps = [runtime.step(ids, mask, caches[ops]) for ops, runtime in runtimes.items()]
        real = mask[:, -tokens:].astype(bool)
        np.testing.assert_allclose(steps[0].logits[real], steps[1].logits[real], atol=1e-5)
        np.testing.assert_array_equal(steps[0].execute[:, real], steps[1].execute[:, real])
        past += tokens
    length = caches["native"].length
    for one, other in zip(caches["native"].values, caches["portable"].values, strict=True):
        np.testing.assert_allclose(one.numpy()[1, :, :length], other.numpy()[1], atol=1e-5)


@needs_library
@pytest.mark.parametrize("ops", ["native", "portable", "auto"])
def test_verify_and_generate_say_which_kernels_ran(
    exported: Path, text_file: Path, ops: str, irc_main: Callable[..., Any]
) -> None:
    expected = "portable" if ops == "portable" else "native"
    small = ["--data", text_file, "--tokens", "64", "--seq-len", "16", "--prompts", "1", "--new-tokens", "2"]
    shown = irc_main("verify", exported, *small, "--ops", ops, "--json")
    assert shown.code == 0, shown.err
    assert shown.json["ops"] == expected
    shown = irc_main("generate", exported, PROMPT, "-n", "2", "--ops", ops)
    assert shown.code == 0
    assert f"{expected} operators" in shown.err


@needs_library
def test_a_mask_that_does_not_fit_the_cache_is_an_error(exported: Path) -> None:
    """In a cache with room the kernel would write where the mask says."""
    for ops in ("native", "portable"):
        runtime = Runtime(exported, "cpu", ops=ops)
        cache = runtime.empty_cache(1)
        runtime.step(np.zeros((1, 5), np.int64), np.ones((1, 5), np.int64), cache)
        for ids, mask in ((1, (1, 3)), (1, (1, 7)), (2, (1, 6))):
            with pytest.raises(InputError, match="the cache holds 5 tokens of 1 sequences"):
                runtime.step(np.zeros((1, ids), np.int64), np.ones(mask, np.int64), cache)
        assert cache.length == 5


@needs_library
def test_a_library_that_knows_no_cache_with_room_gets_one_that_grows(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = native.installed_library()
    assert library is not None
    monkeypatch.setattr(native, "installed_library", lambda: replace(library, cache_with_room=False))
    runtime = Runtime(exported, "cpu")
    assert (runtime.ops, runtime.in_place) == ("native", False)


@needs_library
def test_a_finished_texts_memory_serves_the_next_text_alone(exported: Path) -> None:
    runtime = Runtime(exported, "cpu")

    def begun(batch: int = 1) -> Cache:
        cache = runtime.empty_cache(batch)
        runtime.step(np.zeros((batch, 5), np.int64), np.ones((batch, 5), np.int64), cache)
        return cache

    first = begun()
    memory = first.values[0]
    del first
    second, third = begun(), begun()
    assert second.values[0] is memory
    assert third.values[0] is not memory
    del second
    assert begun(2).values[0] is not memory, "of another batch"


def test_a_dense_model_attends_by_our_kernel_and_writes_its_cache_in_place(dense: Path) -> None:
    library = native.installed_library()
    if library is None:
        pytest.skip("the native operator library is not installed")
    ids, mask = np.arange(10).reshape(2, 5), np.ones((2, 5), np.int64)
    steps = {}
    for ops in ("portable", "native", str(library.path)):
        runtime = Runtime(dense, "cpu", ops=ops)
        assert (runtime.ops, runtime.in_place) == (("portable", False) if ops == "portable" else ("native", True))
        cache = runtime.empty_cache(2)
        first = runtime.step(ids, mask, cache)
        second = runtime.step(ids[:, :1], np.ones((2, 6), np.int64), cache)
        steps[ops] = np.concatenate([first.logits, second.logits], axis=1)
        np.testing.assert_allclose(steps[ops], steps["portable"], atol=1e-5)


@pytest.mark.parametrize("verb", [("generate", "{}", PROMPT), ("verify", "{}")])
def test_a_dense_model_is_no_reason_to_take_any_name_of_kernels(
    dense: Path, text_file: Path, verb: tuple[str, ...], irc_main: Callable[..., Any]
) -> None:
    for ops, sentence in (("nonsense", "nonsense"), (text_file, "cannot be loaded")):
        shown = irc_main(*(word.format(dense) for word in verb), "--ops", ops)
        assert (shown.code, shown.out) == (2, "")
        assert sentence in shown.sentence()


def test_kernels_that_were_asked_for_and_are_not_there(
    exported: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, irc_main: Callable[..., Any]
) -> None:
    shown = irc_main("generate", exported, PROMPT, "--ops", text_file)
    assert shown.code == 2
    assert "the operator library cannot be loaded" in shown.sentence()
    shown = irc_main("generate", exported, PROMPT, "--ops", "nativ")
    assert shown.code == 2
    assert "'nativ'" in shown.sentence()
    monkeypatch.setattr(native, "PACKAGE", "no_such_package_anywhere")
    shown = irc_main("generate", exported, PROMPT, "--ops", "native")
    assert shown.code == 2
    assert "no_such_package_anywhere" in shown.sentence()
    assert irc_main("generate", exported, PROMPT, "-n", "1").code == 0
