"""A folder of format version 1, whose units have Less, Not and SelectRows, loads, runs and is forced as ever."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters.onnx import MODEL
from exporters.onnx_ops import function_protos
from irc.files.atomic import file_sha256
from irc.runtime.folder import MANIFEST
from irc.runtime.native import installed_library
from irc.runtime.session import Runtime

OPS = ["portable", *(["native"] if installed_library() else [])]


@pytest.fixture
def older(copied: Path) -> Path:
    """The exported folder as version 1 had it: the same numbers, the decision in three nodes."""
    model = onnx.load(str(copied / MODEL), load_external_data=False)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "zero"))
    nodes = []
    for node in model.graph.node:
        if node.op_type == "DecideRows":
            (difference,), execute = node.input, node.input[0].replace("logit_difference", "execute")
            nodes.append(onnx.helper.make_node("Less", [difference, "zero"], [f"{execute}.not"]))
            nodes.append(onnx.helper.make_node("Not", [f"{execute}.not"], [execute]))
            node = onnx.helper.make_node("SelectRows", [execute], node.output, domain="irc")
        nodes.append(node)
    del model.graph.node[:], model.functions[:]
    model.graph.node.extend(nodes)
    model.functions.extend(function_protos({node.op_type for node in nodes if node.domain == "irc"}))
    onnx.save(model, str(copied / MODEL))
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["format_version"] = 1
    for unit in manifest["units"]:
        unit["execute"] = unit["difference"].replace("logit_difference", "execute")
    manifest["sha256"][MODEL] = file_sha256(copied / MODEL)
    (copied / MANIFEST).write_text(json.dumps(manifest))
    return copied


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("forced", [False, True])
def test_it_gives_the_same(older: Path, exported: Path, ops: str, forced: bool) -> None:
    ids, mask = np.arange(14).reshape(2, 7), np.ones((2, 7), np.int64)
    runtimes = [Runtime(folder, "cpu", forced=forced, ops=ops) for folder in (older, exported)]
    units = len(runtimes[0].exported.decisions)
    assert units == 4
    told = np.random.default_rng(0).random((units, 2, 7)) < 0.5 if forced else None
    old, new = (runtime.step(ids, mask, runtime.empty_cache(2), told) for runtime in runtimes)
    for name in ("logits", "execute", "difference"):
        np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
    assert 0 < new.execute.mean() < 1


def test_every_unit_follows_what_it_is_told(exported: Path) -> None:
    """One unit at a time is told another thing than the rest, and each time the logits are others."""
    ids, mask = np.arange(14).reshape(2, 7), np.ones((2, 7), np.int64)
    runtime = Runtime(exported, "cpu", forced=True)
    units = len(runtime.exported.decisions)
    told = [np.ones((units, 2, 7), bool) for _ in range(units + 1)]
    for unit in range(units):
        told[unit][unit] = False
    found = [runtime.step(ids, mask, runtime.empty_cache(2), each).logits for each in told]
    assert len({logits.tobytes() for logits in found}) == units + 1
