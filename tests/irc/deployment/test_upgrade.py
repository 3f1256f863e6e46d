"""`irc export --upgrade`: folders of older format versions become today's, whole or not at all, with equal numbers.

`tests/data/onnx-v2` is tests/data/bundle-v1 as irc 0.1.0 exported it at format version 2; the expected values beside it
are what that version's runtime gave on portable operators.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporters.onnx_format import DATA, FORMAT_VERSION, MANIFEST, MODEL
from exporters.onnx_ops import function_protos
from irc.deployment import upgrade as upgrade_module
from irc.deployment.forced import open_forced
from irc.deployment.onnx_folder import ExportOptions, export
from irc.deployment.upgrade import upgrade
from irc.errors import InputError
from irc.files.atomic import file_sha256
from irc.runtime.generation import Generator
from irc.runtime.native import installed_library
from irc.runtime.session import Runtime

TESTS = Path(__file__).parents[2]
OPS = ["portable", *(["native"] if installed_library() else [])]
IDS, MASK = np.arange(14).reshape(2, 7), np.ones((2, 7), np.int64)


@pytest.fixture
def version_2(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TESTS / "data" / "onnx-v2", tmp_path / "old"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def downgrade(folder: Path, version: int) -> None:
    """Make of an exported folder what an older irc wrote: a model without what version 3 added to it.

    Version 1 also had the decision in three nodes.
    """
    (path,) = folder.rglob(MODEL)
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    del model.metadata_props[:]
    (cut,) = (node for node in graph.node if node.op_type == "Slice" and "irc.first_token" in node.input)
    nodes = []
    for node in graph.node:
        node.input[:] = [cut.input[0] if name == cut.output[0] else name for name in node.input]
        if node == cut or "irc.logit_differences" in node.output:
            continue
        if version == 1 and node.op_type == "DecideRows":
            (difference,), execute = node.input, node.input[0].replace("logit_difference", "execute")
            nodes.append(onnx.helper.make_node("Less", [difference, "zero"], [f"{execute}.not"]))
            nodes.append(onnx.helper.make_node("Not", [f"{execute}.not"], [execute]))
            node = onnx.helper.make_node("SelectRows", [execute], node.output, domain="irc")
        nodes.append(node)
    for values in (graph.input, graph.output, graph.initializer):
        kept = [value for value in values if not value.name.startswith(("irc.first_token", "irc.logit_differences"))]
        del values[:]
        values.extend(kept)
    del graph.node[:]
    graph.node.extend(nodes)
    if version == 1:
        graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "zero"))
        del model.functions[:]
        model.functions.extend(function_protos({node.op_type for node in nodes if node.domain == "irc"}))
    onnx.save(model, str(path))

    def change(manifest: dict[str, Any]) -> None:
        manifest.update(format_version=version, source="/gone/bundle", sparsity=manifest.pop("dial"))
        manifest["sha256"][MODEL] = file_sha256(path)
        for unit in manifest["units"] if version == 1 else ():
            unit["execute"] = unit["difference"].replace("logit_difference", "execute")

    edit(folder, change)


def test_the_runtime_names_the_command(version_2: Path, irc_main: Callable[..., Any]) -> None:
    before = contents(version_2)
    shown = irc_main("generate", version_2, "def f(")
    assert (shown.code, shown.out) == (2, "")
    assert f"irc export --upgrade {version_2}" in shown.sentence()
    assert contents(version_2) == before


def test_a_folder_of_version_2_gives_what_it_gave(
    version_2: Path, tmp_path: Path, irc_main: Callable[..., Any]
) -> None:
    before = contents(version_2)
    shown = irc_main("export", "--upgrade", version_2, "--json")
    assert shown.code == 0, shown.err
    assert (shown.json["from_version"], shown.json["format_version"]) == (2, FORMAT_VERSION)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    after = contents(version_2)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed - {"tokenizer.json", "tokenizer_config.json"} == {MODEL, MANIFEST}
    manifest = json.loads(after[MANIFEST])
    assert manifest["sparsity"] == pytest.approx(1 - np.mean([unit["keep_ratio"] for unit in manifest["units"]]))
    assert not Path(manifest["source"]).is_absolute()
    expected = np.load(TESTS / "data" / "onnx-v2-expected.npz")
    runtime = Runtime(version_2, "cpu", ops="portable")
    step = runtime.step(IDS, MASK, runtime.empty_cache(2))
    np.testing.assert_allclose(step.logits, expected["logits"], atol=1e-6)
    np.testing.assert_allclose(step.difference, expected["difference"], atol=1e-6)
    np.testing.assert_array_equal(step.execute, expected["execute"])
    assert 0 < step.execute.mean() < 1
    assert Generator(runtime).continue_ids(list(range(40, 50)), 12) == expected["tokens"].tolist()


def test_a_folder_of_today_stays_as_it_is(exported: Path, irc_main: Callable[..., Any]) -> None:
    before = contents(exported)
    shown = irc_main("export", "--upgrade", exported)
    assert shown.code == 0
    assert "nothing was changed" in shown.out
    assert contents(exported) == before


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["routed", "dense"])
def test_an_older_folder_gives_what_today_s_export_gives(
    version: int, kind: str, exported: Path, dense: Path, tmp_path: Path
) -> None:
    today = exported if kind == "routed" else dense
    older = Path(shutil.copytree(today, tmp_path / "older"))
    downgrade(older, version)
    with pytest.raises(InputError, match=f"irc export --upgrade {older}"):
        Runtime(older, "cpu")
    upgrade(older)
    for ops in OPS:
        runtimes = [Runtime(folder, "cpu", ops=ops) for folder in (older, today)]
        assert runtimes[0].in_place == runtimes[1].in_place
        for last in (False, True):
            old, new = (runtime.step(IDS, MASK, runtime.empty_cache(2), last=last) for runtime in runtimes)
            for name in ("logits", "execute", "difference"):
                np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
    if kind == "routed":
        assert 0 < new.execute.mean() < 1
        units = len(runtimes[0].exported.decisions)
        assert units == 4
        told = np.random.default_rng(0).random((units, 2, 7)) < 0.5
        forced = [open_forced(folder, "cpu") for folder in (older, today)]
        old, new = (runtime.step(IDS, MASK, runtime.empty_cache(2), told) for runtime in forced)
        np.testing.assert_array_equal(old.logits, new.logits)


def test_a_triton_repository(bundle: Path, tmp_path: Path, irc_main: Callable[..., Any]) -> None:
    folder = tmp_path / "triton"
    export(str(bundle), folder, ExportOptions(layout="triton"))
    wanted = irc_main("generate", folder, "def f(", "-n", "4", "--json").json["tokens"]
    downgrade(folder, 2)
    upgrade(folder)
    assert not (folder / MODEL).exists()
    assert irc_main("generate", folder, "def f(", "-n", "4", "--json").json["tokens"] == wanted


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "half of the units": (lambda m: m.update(units=m["units"][::2]), "2 of the model's 4"),
    "a unit twice": (lambda m: m["units"].append(m["units"][1]), "layers.0.mlp"),
    "another unit": (lambda m: m["units"].append({"unit": "x", "difference": "x.logit_difference"}), "unit x"),
    "a value that is not a decision": (lambda m: m["units"][1].update(difference="logits"), "layers.0.mlp"),
    "newer": (lambda m: m.update(format_version=99), "99"),
    "hash": (lambda m: m["sha256"].update({DATA: "0" * 64}), DATA),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_and_stays(version_2: Path, irc_main: Callable[..., Any], name: str) -> None:
    change, value = DAMAGES[name]
    edit(version_2, change)
    before = contents(version_2)
    shown = irc_main("export", "--upgrade", version_2)
    assert (shown.code, shown.out) == (2, "")
    assert value in shown.sentence()
    assert contents(version_2) == before


@pytest.mark.parametrize("place", ["../model.onnx.data", "config.json", ""])
def test_weights_outside_of_the_folder_are_refused(version_2: Path, place: str) -> None:
    model = onnx.load(version_2 / MODEL, load_external_data=False)
    moved = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in moved.external_data if entry.key == "location").value = place
    (version_2 / MODEL).write_bytes(model.SerializeToString())
    edit(version_2, lambda m: m["sha256"].update({MODEL: file_sha256(version_2 / MODEL)}))
    with pytest.raises(InputError, match=r"model\.onnx"):
        upgrade(version_2)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_upgrade_that_failed(
    version_2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, irc_main: Callable[..., Any], error: BaseException
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    before = contents(version_2)
    monkeypatch.setattr(upgrade_module, "write_tokenizer", fail)
    code = irc_main("export", "--upgrade", version_2).code
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert contents(version_2) == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--upgrade", "x", "demo"),
        ("--upgrade", "x", "-o", "y"),
        ("--upgrade", "x", "--dtype", "fp16"),
        ("--upgrade", "x", "--force"),
        ("demo",),
        ("-o", "y"),
        (),
    ],
)
def test_arguments_that_do_not_go_together(irc_main: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    shown = irc_main("export", *arguments)
    assert (shown.code, shown.out) == (2, "")
    assert "--upgrade" in shown.sentence()
