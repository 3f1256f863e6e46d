"""Every loader either loads a mutated file or raises InputError, quickly and without large allocations.

`make fuzz` feeds at least ten million bytes to each loader. Files that are protected by a hash get the right hash
again, because whoever alters a folder can do that too.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import irc
from exporters.onnx_format import MANIFEST
from irc.bundle.config import read_config
from irc.bundle.layout import ADAPTER, CONFIG, RECIPE
from irc.bundle.saving import save_bundle
from irc.conversion.pipeline import resolve
from irc.deployment.onnx_folder import export
from irc.errors import InputError
from irc.files.atomic import file_sha256
from irc.model.capture import Captured, assign_weights
from irc.model.checkpoint import BaseModel, find_base
from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import Recipe, load_recipe
from irc.runtime.folder import open_folder
from irc.runtime.generation import Generator
from irc.runtime.session import Runtime
from irc.training.lora import WEIGHTS

FULL_LOADS = 8
"""How many mutated files per loader are loaded in full after they passed its checks, which takes longer."""


class Few:
    """Calls a function for the first few inputs only."""

    def __init__(self, most: int = FULL_LOADS) -> None:
        self.left = most

    def __call__(self, function: Callable[[], object]) -> None:
        if self.left > 0:
            self.left -= 1
            function()


@pytest.fixture
def bundle(make_routed: Any, shake: Any, lora_on: Any, tmp_path: Path) -> Path:
    model = lora_on(shake(make_routed()))
    save_bundle(model, tmp_path / "bundle", {"calibration_keep": {unit.name: 0.4 for unit in model.units}})
    return tmp_path / "bundle"


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture(scope="session")
def routed_onnx(base: BaseModel, shake: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from irc.model.build import build_routed
    from irc.model.routed import RoutingSpec

    model = shake(build_routed(base, RoutingSpec(4), "fp32"))
    folder = tmp_path_factory.mktemp("fuzz")
    save_bundle(model, folder / "bundle")
    export(str(folder / "bundle"), folder / "onnx")
    return folder / "onnx"


@pytest.fixture
def onnx_folder(routed_onnx: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(routed_onnx, tmp_path / "onnx"))


def test_bundle_config(fuzz: Any, bundle: Path) -> None:
    few = Few()

    def load() -> None:
        read_config(bundle)
        few(lambda: irc.load(bundle))

    fuzz(bundle / CONFIG, load)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no threshold, no shares": (
        lambda c: (c.update(kv_policy="reduced"), c.pop("kv_threshold"), c["units"].pop()),
        "does not say what its units skip",
    ),
    "dropout": (lambda c: c["lora"].update(dropout=1e308), "lora.dropout is 1e\\+308"),
    "no targets": (lambda c: c["lora"].update(targets=[]), r"lora.targets is \[\]"),
    "a rank of gigabytes": (lambda c: c["lora"].update(rank=10**9), "its rank is not 1000000000"),
    "a seed that is none": (lambda c: c["spec"].update(seed=10**12), "seed is 1000000000000"),
}


@pytest.mark.parametrize("how", CONFIGS)
def test_configs_that_once_passed_the_checks(bundle: Path, how: str) -> None:
    change, reason = CONFIGS[how]
    config = json.loads((bundle / CONFIG).read_text())
    change(config)
    (bundle / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=reason):
        irc.load(bundle)


def test_a_rank_of_gigabytes_that_a_tensor_of_no_bytes_bears_out(bundle: Path) -> None:
    """The rank allocates nothing, because shapes are compared first."""
    from safetensors.torch import load_file, save_file

    path = bundle / "lora" / WEIGHTS
    save_file({name: torch.zeros(10**9, 0) for name in load_file(path)}, path)
    config = json.loads((bundle / CONFIG).read_text())
    config["lora"]["rank"], config["lora_sha256"] = 10**9, file_sha256(path)
    (bundle / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is \[1000000000, 0\], expected"):
        irc.load(bundle)


def test_bundle_recipe(fuzz: Any, tmp_path: Path) -> None:
    path = tmp_path / RECIPE
    path.write_text(yaml.safe_dump(Recipe().to_dict(), sort_keys=False))
    fuzz(path, lambda: resolve(load_recipe(path)))


TRAPS = {
    "aliases": "a: &a [x, x]\ndial: [*a, *a]",
    "duplicate key": "seed: 1\nseed: 2",
    "deep nesting": "dial: " + "[" * 5000,
    "impossible date": "rank: 2001-02-31",
    "huge hexadecimal number": "seed: 0x" + "f" * 6000,
    "number larger than a float": "seed: 0x" + "f" * 200,
    "more digits than Python prints": "lff: 0x" + "f" * 6000,
    "more digits than Python reads": "lff: " + "9" * 6000,
}


@pytest.mark.parametrize("trap", TRAPS)
def test_recipes_that_are_traps(tmp_path: Path, trap: str) -> None:
    (tmp_path / RECIPE).write_text(TRAPS[trap])
    with pytest.raises(InputError, match=RECIPE):
        load_recipe(tmp_path / RECIPE)


def test_adapter(fuzz: Any, bundle: Path, make_routed: Any) -> None:
    from irc.bundle.loading import read_adapter, set_adapter

    model: RoutedForCausalLM = make_routed()
    path = bundle / ADAPTER
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    fuzz(path, lambda: set_adapter(model, read_adapter(bundle, file_sha256(path)), "b"), header + 64)


def test_lora_weights(fuzz: Any, bundle: Path) -> None:
    from irc.recipe.stages import LoraRecipe
    from irc.training.lora import load_lora

    model = irc.load(bundle)
    path = bundle / "lora" / WEIGHTS
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    fuzz(path, lambda: load_lora(model, bundle / "lora", LoraRecipe(rank=2)), header + 64)


def test_checkpoint(fuzz: Any, copied: Path, copied_capture: Callable[..., Captured]) -> None:
    captured = copied_capture(find_base(str(copied)).config, torch.float32)
    few, path = Few(), copied / "model.safetensors"

    def load() -> None:
        base = find_base(str(copied))
        weights = base.weights()
        base.check_sizes(weights)
        base.check_finite()
        few(lambda: assign_weights(copy.deepcopy(captured), weights))

    fuzz(path, load, 8 + int.from_bytes(path.read_bytes()[:8], "little") + 64)


def test_checkpoint_index(fuzz: Any, copied: Path) -> None:
    names = dict.fromkeys(find_base(str(copied)).weights(), "model-00001-of-00001.safetensors")
    (copied / "model.safetensors").rename(copied / "model-00001-of-00001.safetensors")  # or it would be taken first
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    fuzz(index, lambda: list(find_base(str(copied)).weights()))


def test_model_config(fuzz: Any, copied: Path) -> None:
    from irc.model.build import build_plain

    few = Few(2)

    def load() -> None:
        base = find_base(str(copied))
        base.check_sizes(base.weights())
        few(lambda: build_plain(base))

    fuzz(copied / "config.json", load)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(fuzz: Any, copied: Path, name: str) -> None:
    fuzz(copied / name, lambda: find_base(str(copied)).tokenizer)


def test_onnx_generation_config(fuzz: Any, onnx_folder: Path) -> None:
    runtime = Runtime(onnx_folder, "cpu")
    fuzz(onnx_folder / "generation_config.json", lambda: Generator(runtime))


def test_onnx_manifest(fuzz: Any, onnx_folder: Path) -> None:
    few = Few()

    def load() -> None:
        open_folder(onnx_folder)
        few(lambda: step(onnx_folder))

    fuzz(onnx_folder / MANIFEST, load)


def step(folder: Path) -> None:
    runtime = Runtime(folder, "cpu")
    ids = torch.tensor([[1, 2, 3]]).numpy()
    runtime.step(ids, np.ones_like(ids), runtime.empty_cache(1))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_onnx_model(fuzz: Any, onnx_folder: Path, name: str) -> None:
    def load() -> None:
        manifest = json.loads((onnx_folder / MANIFEST).read_text())
        manifest["sha256"][name] = file_sha256(onnx_folder / name)
        (onnx_folder / MANIFEST).write_text(json.dumps(manifest))
        Runtime(onnx_folder, "cpu")

    fuzz(onnx_folder / name, load)
