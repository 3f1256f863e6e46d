"""Routers that read the forecaster's bottleneck: what PyTorch computes is what the export computes, and is counted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import irc
from irc.bundle.saving import save_bundle
from irc.deployment.onnx_folder import export
from irc.model.build import build_routed
from irc.model.checkpoint import BaseModel
from irc.model.flops import unit_flops
from irc.model.routed import RoutingSpec
from irc.runtime.native import installed_library
from irc.runtime.session import Runtime

OPS = ["portable", *(["native"] if installed_library() else [])]


@pytest.fixture(scope="module", params=["linear", "silu"])
def folder(request: Any, base: BaseModel, shake: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = shake(build_routed(base, RoutingSpec(4, request.param, reads="bottleneck"), "fp32"))
    work = tmp_path_factory.mktemp("bottleneck")
    save_bundle(model, work / "bundle")
    export(str(work / "bundle"), work / "onnx")
    return work


@pytest.mark.parametrize("ops", OPS)
def test_the_export_routes_as_pytorch_does(folder: Path, ops: str) -> None:
    model = irc.load(folder / "bundle")
    ids = torch.arange(24).view(2, 12)
    tape: dict[str, Any] = {}
    with torch.no_grad(), model.control.using(tape=tape):
        logits = model(input_ids=ids, use_cache=False).logits
    runtime = Runtime(folder / "onnx", "cpu", ops=ops)
    step = runtime.step(ids.numpy(), np.ones((2, 12), np.int64), runtime.empty_cache(2))
    execute = torch.stack([record.execute for record in tape.values()]).numpy()
    assert 0 < execute.mean() < 1
    np.testing.assert_array_equal(step.execute, execute)
    np.testing.assert_allclose(step.logits, logits.numpy(), atol=1e-4)


def test_a_copy_reads_its_own_forecaster(folder: Path) -> None:
    model = irc.load(folder / "bundle")
    again = copy.deepcopy(model)
    for unit in model.units:
        router, forecaster = (again.part(unit, role) for role in ("router", "forecaster"))
        assert router.bottleneck is forecaster.down
        assert router.bottleneck is not model.part(unit, "forecaster").down
        assert set(dict(router.named_parameters())) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_bottleneck_is_counted_for_every_token(folder: Path) -> None:
    model = irc.load(folder / "bundle")
    for flops in unit_flops(model, 16).values():
        assert flops.router == 2 * (32 * 4 + 4 * 8 + 8 * 2)  # d to rank, rank to hidden, hidden to two logits
        assert flops.forecaster == 2 * (32 * 4 + 4 * 32)
