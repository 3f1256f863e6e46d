"""Names of devices: what they mean on this machine, and errors for devices that it does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import irc
from irc.bundle.loading import open_model
from irc.bundle.source import ModelSource
from irc.conversion.pipeline import resolve
from irc.devices import find_device
from irc.errors import InputError
from irc.recipe.recipe import Recipe

REFUSED = {
    "": "''",
    "gpu": "'gpu'",
    "cpu:3": "'cpu:3'",
    "cuda:": "'cuda:'",
    "cuda:-1": "'cuda:-1'",
    "cuda:1234": "'cuda:1234'",
    "meta": "'meta'",
    3: " 3;",
    None: "None",
}


@pytest.mark.parametrize(("name", "shown"), REFUSED.items())
def test_what_is_no_device_is_refused(name: str, shown: str) -> None:
    with pytest.raises(InputError, match=shown):
        find_device(name)


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_only_what_is_there_is_found(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_device("cpu") == "cpu"
    assert find_device("auto") == ("cuda" if gpus else "cpu")
    for number, name in enumerate(["cuda", "cuda:0", "cuda:1", "cuda:2"]):
        if max(number - 1, 0) < gpus:
            assert find_device(name) == name
        else:
            with pytest.raises(InputError, match=f"'{name}'.*" + (f"cuda:{gpus - 1}" if gpus else "")):
                find_device(name)
    with pytest.raises(InputError, match="'mps'"):
        find_device("mps")


def test_recipes_bundles_and_models_ask_for_it(tmp_path: Path) -> None:
    for use in (
        lambda: resolve(Recipe(device="gpu")),
        lambda: irc.load(tmp_path, device="gpu"),
        lambda: open_model(ModelSource("demo", device="gpu")),
    ):
        with pytest.raises(InputError, match="'gpu'"):
            use()


def test_a_bundle_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="aaa"):
        irc.load(tmp_path / ("a" * 300))
