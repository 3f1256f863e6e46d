"""The sparsity dial: a bundle converted once runs at other sparsities, in PyTorch and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import irc
from irc.bundle.contents import bundle_of
from irc.bundle.dial import turn_dial
from irc.errors import InputError
from irc.recipe.recipe import Recipe
from irc.recipe.target import Target
from irc.text.source import windows
from irc.training.calibrate import dial_points, measured_keep
from irc.training.stages import StageContext

GRID = [0.1, 0.3, 0.6]


def test_points_reach_their_targets_and_leave_the_model_alone(
    make_context: Callable[..., StageContext], shake: Any
) -> None:
    context = make_context()
    model, text = shake(context.model), context.calibration_windows()
    before = {name: p.clone() for name, p in model.adapter_parameters("router").items()}
    points = dial_points(model, text, GRID[::-1], context.progress)
    assert all(torch.equal(before[name], p) for name, p in model.adapter_parameters("router").items())
    assert [point["sparsity"] for point in points] == GRID
    for point in points:
        assert point["realized"] == pytest.approx(point["sparsity"], abs=0.01)
        for unit in model.units:
            model.part(unit, "router").shift(point["shift"][unit.name])  # type: ignore[operator]
        keep = measured_keep(model, text)
        assert keep == pytest.approx(point["keep"], abs=2e-3)
        for unit in model.units:
            model.part(unit, "router").shift(-point["shift"][unit.name])  # type: ignore[operator]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dial") / "b"


@pytest.fixture
def converted(bundle: Path, irc_main: Any, convert_arguments: Callable[..., list[str]]) -> Path:
    if not bundle.exists():
        arguments = convert_arguments(bundle, router__calibration_tokens=8192)
        outcome = irc_main(*arguments, "--dial", "0.1,0.3,0.6")
        assert outcome.code == 0, outcome.err
    return bundle


def test_the_own_target_is_on_the_dial(converted: Path) -> None:
    config = json.loads((converted / "irc_config.json").read_text())
    points = {point["sparsity"]: point for point in config["dial"]}
    assert list(points) == [0.1, 0.25, 0.3, 0.6]
    assert set(points[0.25]["shift"].values()) == {0.0}
    assert points[0.25]["realized"] == pytest.approx(0.25, abs=0.01)
    assert points[0.25]["keep"] == {unit["name"]: unit["calibration_keep"] for unit in config["units"]}


def test_the_own_target_is_not_searched_again() -> None:
    assert Recipe(sparsity=0.25, dial=[0.1, 0.25, 0.4]).others_on_dial == [0.1, 0.4]
    assert Recipe(flops=0.8, dial=[0.8]).others_on_dial == []


def realized(bundle: Path, sparsity: float | None, streams: dict[str, torch.Tensor]) -> float:
    keep = measured_keep(irc.load(bundle, sparsity=sparsity), windows(streams["calibration"], 16)[:256])
    return 1 - sum(keep.values()) / len(keep)


def test_any_sparsity_between(converted: Path, streams: dict[str, torch.Tensor]) -> None:
    found = [realized(converted, share, streams) for share in (0.1, 0.2, 0.3, 0.45, 0.6)]
    assert found == sorted(found)
    for share, got in zip((0.1, 0.3, 0.6), (found[0], found[2], found[4]), strict=True):
        assert got == pytest.approx(share, abs=0.05)  # part of the calibration text
    assert found[1] == pytest.approx(0.2, abs=0.08)  # interpolated
    assert realized(converted, None, streams) == pytest.approx(0.25, abs=0.05)
    assert realized(converted, 0.25, streams) == realized(converted, None, streams)


def test_a_loaded_bundle_keeps_its_dial_when_it_is_saved(converted: Path, tmp_path: Path) -> None:
    irc.load(converted).save_pretrained(tmp_path / "again")
    first, again = (json.loads((folder / "irc_config.json").read_text()) for folder in (converted, tmp_path / "again"))
    assert again["dial"] == first["dial"] != []
    for key in ("name", "calibration_keep"):
        assert [unit[key] for unit in again["units"]] == [unit[key] for unit in first["units"]]
    irc.load(converted, sparsity=0.3).save_pretrained(tmp_path / "turned")  # its shifts would no longer fit
    assert json.loads((tmp_path / "turned" / "irc_config.json").read_text())["dial"] == []


def test_tasks_follow_the_dial_and_refuse_what_is_for_perplexity(converted: Path, irc_main: Any) -> None:
    for flags, part in (
        (("--sparsity", "0.95"), "0.95"),
        (("--tokens", "9"), "--tokens"),
        (("--kv-sweep", "0.5"), "--kv-sweep"),
        (("--split", "all"), "--split"),
    ):
        outcome = irc_main("eval", converted, "--tasks", "code_closing", "--limit", "1", *flags)
        assert outcome.code == 2
        assert part in outcome.sentence()
    assert "--tasks" in irc_main("eval", converted, "--tasks", ",").sentence()
    found = [
        irc_main("eval", converted, "--tasks", "code_closing", "--limit", "3", "--sparsity", share, "--json").json
        for share in ("0.1", "0.6")
    ]
    assert found[0]["sparsity"]["realized"] < 0.35 < found[1]["sparsity"]["realized"]
    assert found[0]["tasks"]["code_closing"]["routed"]["questions"] == 3


def test_the_command_line_turns_it(converted: Path, irc_main: Any, text_file: Path, tmp_path: Path) -> None:
    outcome = irc_main("eval", converted, "--sparsity-sweep", "0.1,0.3,0.6", "--json")
    assert outcome.code == 0, outcome.err
    sweep = outcome.json["sparsity_sweep"]
    assert [row["target"] for row in sweep] == GRID
    assert sweep[0]["flops_ratio"] > sweep[1]["flops_ratio"] > sweep[2]["flops_ratio"]
    alone = irc_main("eval", converted, "--sparsity", "0.6", "--json").json
    assert alone["perplexity"]["routed"] == pytest.approx(sweep[2]["perplexity"])
    assert alone["sparsity"]["target"] == 0.6
    table = irc_main("eval", converted, "--sparsity-sweep", "0.1,0.6")
    assert [line.split()[0] for line in table.out.splitlines() if line[:3] in ("0.1", "0.6")] == ["0.1", "0.6"]
    assert irc_main("export", converted, "-o", tmp_path / "onnx", "--sparsity", "0.6").code == 0
    manifest = json.loads((tmp_path / "onnx" / "irc.json").read_text())
    assert manifest["sparsity"] == manifest["dial"] == 0.6
    verified = irc_main(
        "verify", tmp_path / "onnx", "--data", text_file, "--seq-len", "16", "--tokens", "256", "--json"
    )
    assert verified.code == 0, verified.err
    assert verified.json["routing_agreement"] > 0.999


def test_what_cannot_be_turned_is_refused(
    converted: Path, irc_main: Any, model_folder: Path, convert_arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"0\.7 .*0\.1 .*0\.6"):
        irc.load(converted, sparsity=0.7)
    with pytest.raises(InputError, match=r"'0\.3'.*0\.1 .*0\.6"):
        irc.load(converted, sparsity="0.3")  # type: ignore[arg-type]
    for flags in (("--sparsity", "0.3"), ("--sparsity-sweep", "0.1,0.3")):
        outcome = irc_main("eval", model_folder, *flags)
        assert (outcome.code, str(model_folder) in outcome.sentence()) == (2, True)
    outcome = irc_main("eval", converted, "--sparsity-sweep", "0.1,0.7")
    assert (outcome.code, "0.7" in outcome.sentence()) == (2, True)
    outcome = irc_main(*convert_arguments(tmp_path / "s"), "--policy", "static", "--dial", "0.1,0.2")
    assert (outcome.code, "static" in outcome.sentence()) == (2, True)
    outcome = irc_main(*convert_arguments(tmp_path / "s"), "--dial", "0.1,2")
    assert outcome.code == 2


def test_turned_twice_is_turned_once(converted: Path) -> None:
    model, once = irc.load(converted, sparsity=0.6), irc.load(converted, sparsity=0.2)
    turn_dial(model, Target("sparsity", 0.2))
    wanted = once.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert bundle_of(model) == bundle_of(once)


def test_a_bundle_without_a_dial_says_how_to_get_one(make_routed: Any, tmp_path: Path) -> None:
    make_routed().save_pretrained(tmp_path / "b")
    with pytest.raises(InputError, match="dial"):
        irc.load(tmp_path / "b", sparsity=0.2)
