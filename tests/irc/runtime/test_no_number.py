"""A router whose logits are no numbers executes its unit: the dense model is the safe answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from irc.bundle.saving import save_bundle
from irc.deployment.forced import open_forced
from irc.deployment.onnx_folder import export
from irc.errors import InputError
from irc.files.atomic import file_sha256
from irc.model.build import build_routed
from irc.model.checkpoint import BaseModel
from irc.model.routed import RoutingSpec
from irc.runtime.native import installed_library
from irc.runtime.session import Runtime

OPS = ["portable", *(["native"] if installed_library() else [])]


@pytest.fixture(scope="module")
def folder(base: BaseModel, shake: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = shake(build_routed(base, RoutingSpec(4), "fp32"))
    for unit in model.units:
        with torch.no_grad():
            model.part(unit, "router").last.bias.fill_(torch.nan)
    work = tmp_path_factory.mktemp("nan")
    save_bundle(model, work / "bundle")
    export(str(work / "bundle"), work / "onnx")
    ids = torch.arange(12).view(2, 6)
    tape: dict[str, Any] = {}
    with torch.no_grad(), model.control.using(tape=tape):
        model(input_ids=ids, use_cache=False)
    assert all(bool(record.execute.all()) for record in tape.values())
    return work / "onnx"


@pytest.mark.parametrize("ops", OPS)
def test_it_executes(folder: Path, dense: Path, ops: str) -> None:
    ids, mask = np.arange(12).reshape(2, 6), np.ones((2, 6), np.int64)
    runtimes = (Runtime(dense, "cpu"), Runtime(folder, "cpu", ops=ops))
    steps = [runtime.step(ids, mask, runtime.empty_cache(2)) for runtime in runtimes]
    assert steps[1].execute.all()
    assert np.isnan(steps[1].difference).all()
    np.testing.assert_allclose(steps[1].logits, steps[0].logits, atol=1e-5)


@pytest.fixture
def spoilt(exported: Path, tmp_path: Path) -> Path:
    """A folder whose head gives one token of the vocabulary no number, under the right hash."""
    folder = Path(shutil.copytree(exported, tmp_path / "spoilt"))
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    head = next(t for t in graph.initializer if "lm_head" in t.name and len(t.dims) == 2)
    where = {entry.key: entry.value for entry in head.external_data}
    with (folder / where["location"]).open("r+b") as opened:
        opened.seek(int(where["offset"]))
        opened.write(np.full(head.dims[1], np.nan, np.float32).tobytes())
    manifest = json.loads((folder / "irc.json").read_text())
    manifest["sha256"][where["location"]] = file_sha256(folder / where["location"])
    (folder / "irc.json").write_text(json.dumps(manifest))
    return folder


def test_it_passes_no_verify(spoilt: Path, text_file: Path, irc_main: Callable[..., Any]) -> None:
    shown = irc_main("verify", spoilt, "--data", text_file, "--seq-len", "16", "--tokens", "64", "--prompts", "0")
    assert shown.code == 3, shown.out + shown.err


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_no_token_is_chosen_of_it(spoilt: Path, irc_main: Callable[..., Any], temperature: str) -> None:
    shown = irc_main("generate", spoilt, "hello", "--temperature", temperature)
    assert shown.code == 1
    assert "the model's logits are not finite" in shown.err


@pytest.mark.parametrize(
    "execute",
    [None, np.ones((3, 2, 6), bool), np.ones((4, 6, 2), bool), np.ones(48, bool), np.full((4, 2, 6), np.nan)],
    ids=["missing", "units", "turned", "flat", "numbers"],
)
def test_decisions_of_another_kind_are_refused(exported: Path, execute: Any) -> None:
    ids, mask = np.arange(12).reshape(2, 6), np.ones((2, 6), np.int64)
    forced = open_forced(exported, "cpu")
    with pytest.raises(InputError, match=r"bool \[4, 2, 6\]"):
        forced.step(ids, mask, forced.empty_cache(2), execute)
    free = Runtime(exported, "cpu")
    with pytest.raises(InputError, match="execute is given"):
        free.step(ids, mask, free.empty_cache(2), np.ones((4, 2, 6), bool))
