"""Names of devices: what they mean here, and the sentence where one is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import irc
from irc.conversion.pipeline import resolve
from irc.devices import find_device
from irc.errors import InputError
from irc.evaluation.run import open_model
from irc.recipe.recipe import Recipe

REFUSED = {
    "": "device is ''; use auto, cpu",
    "gpu": "device is 'gpu'; use auto, cpu",
    "cpu:3": "device is 'cpu:3'",
    "cuda:": "device is 'cuda:'",
    "cuda:-1": "device is 'cuda:-1'",
    "cuda:1234": "device is 'cuda:1234'",
    "meta": "device is 'meta'",
    3: "device is 3",
    None: "device is None",
}


@pytest.mark.parametrize(("name", "sentence"), REFUSED.items())
def test_what_is_no_device_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
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
            with pytest.raises(InputError, match=f"'{name}', but .*" + (f"is cuda:{gpus - 1}" if gpus else "no CUDA")):
                find_device(name)
    with pytest.raises(InputError, match="no Apple GPU"):
        find_device("mps")


def test_recipes_bundles_and_models_ask_for_it(tmp_path: Path) -> None:
    for use in (
        lambda: resolve(Recipe(device="gpu")),
        lambda: irc.load(tmp_path, device="gpu"),
        lambda: open_model("demo", device="gpu"),
    ):
        with pytest.raises(InputError, match="device is 'gpu'"):
            use()


def test_a_bundle_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        irc.load(tmp_path / ("a" * 300))
