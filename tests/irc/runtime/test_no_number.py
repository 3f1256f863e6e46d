"""A router whose logits are no numbers executes its unit: the dense model is the safe answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from irc.bundle import save_bundle
from irc.export import export
from irc.model.checkpoint import BaseModel
from irc.model.routed import RoutingSpec, build_routed
from irc.runtime.native import installed_library
from irc.runtime.session import Runtime

OPS = ["portable", *(["native"] if installed_library() else [])]


@pytest.fixture(scope="module")
def folder(base: BaseModel, shake: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = shake(build_routed(base, RoutingSpec(4), "fp32"))
    model.facts["base"] = base
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
